"""TensorWatch: whether any of many tensors changed."""

from collections.abc import Iterable
from operator import attrgetter

from torch import Tensor

from gradhooks.engine.tensor_records import TensorRecord

_counter_of = attrgetter("_version")
_flag_of = attrgetter("requires_grad")
_bytes_of = attrgetter("raw")


class TensorWatch:
    """Tells in a few calls of C whether any of many tensors changed since its record (`tensor_records.py`, Rule 1)."""

    def __init__(self, records: Iterable[TensorRecord]) -> None:
        records = list({id(record.tensor): record for record in records}.values())
        self._tensors = [record.tensor for record in records]
        self._flags = [record.requires_grad for record in records]
        counted = [record for record in records if not record.tensor.is_inference()]
        self._counted = [record.tensor for record in counted]
        self._versions = [record.version for record in counted]
        placed = [record for record in records if record.address is not None]
        self._placed = [record.tensor for record in placed]
        self._addresses = [(record.address or (0, 0))[0] for record in placed]
        self._sizes = [(record.address or (0, 0))[1] for record in placed]
        shown = [record for record in placed if record.window is not None]
        self._windows = [record.window for record in shown]
        self._heads = [record.head for record in shown]

    def unchanged(self) -> bool:
        """Return whether no tensor shows a change."""
        return (
            list(map(_counter_of, self._counted)) == self._versions
            and list(map(_flag_of, self._tensors)) == self._flags
            and list(map(Tensor.data_ptr, self._placed)) == self._addresses
            and list(map(Tensor.numel, self._placed)) == self._sizes
            # Only now is it certain that the windows still show memory of the tensors.
            and list(map(_bytes_of, self._windows)) == self._heads
        )

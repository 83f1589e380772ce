"""SignReader: what shows of many tensors at one time, read in a few calls of C."""

from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from gradhooks.engine.tensor_records import address_of, version_of, window_of

_counter_of = attrgetter("_version")
_flag_of = attrgetter("requires_grad")
_bytes_of = attrgetter("raw")


class Signs(NamedTuple):
    """What shows of tensors without cost (`tensor_records.py`, Rule 1), in their order.

    Attributes:
        versions: Version counters.
        flags: `requires_grad`.
        addresses: Where the elements are.
        sizes: Numbers of elements.
        heads: The first bytes on the CPU, None elsewhere.
    """

    versions: list[int]
    flags: list[bool]
    addresses: list[int]
    sizes: list[int]
    heads: list[bytes | None]

    def is_same(self, other: "Signs", index: int) -> bool:
        """Return whether nothing shows that a tensor changed."""
        return (
            self.versions[index] == other.versions[index]
            and self.flags[index] == other.flags[index]
            and self.is_in_place(other, index)
        )

    def is_in_place(self, other: "Signs", index: int) -> bool:
        """Return whether the memory of a tensor is the same, and begins with the same bytes."""
        return (
            self.addresses[index] == other.addresses[index]
            and self.sizes[index] == other.sizes[index]
            and self.heads[index] == other.heads[index]
        )


class _NoWindow:
    """Stands for the window of a tensor that has none."""

    raw: bytes | None = None


class SignReader:
    """Reads signs of the same tensors again and again.

    Args:
        tensors: The tensors.

    Attributes:
        tensors: The tensors.
        aliases: The memory that each tensor had when its signs were read last; another list when one gets other memory.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.aliases: list[Tensor] = [tensor.detach() for tensor in tensors]
        self._has_counters = not any(tensor.is_inference() for tensor in tensors)
        self._is_ordinary = all(address_of(tensor) is not None for tensor in tensors)
        self._addresses, self._sizes = self._read_places()
        self._windows: list[Any] = [window_of(tensor) or _NoWindow for tensor in tensors]

    def read(self) -> Signs:
        """Return the signs of now."""
        addresses, sizes = self._read_places()
        if addresses != self._addresses or sizes != self._sizes:
            self._move(addresses, sizes)
        return Signs(
            list(map(_counter_of if self._has_counters else version_of, self.tensors)),
            list(map(_flag_of, self.tensors)),
            addresses,
            sizes,
            list(map(_bytes_of, self._windows)),
        )

    def _read_places(self) -> tuple[list[int], list[int]]:
        if self._is_ordinary:
            return list(map(Tensor.data_ptr, self.tensors)), list(map(Tensor.numel, self.tensors))
        places = [address_of(tensor) or (0, 0) for tensor in self.tensors]
        return [address for address, _ in places], [size for _, size in places]

    def _move(self, addresses: list[int], sizes: list[int]) -> None:
        """Look at other memory from now on, where tensors have it."""
        aliases, windows = list(self.aliases), list(self._windows)
        for index, tensor in enumerate(self.tensors):
            if (addresses[index], sizes[index]) != (self._addresses[index], self._sizes[index]):
                aliases[index], windows[index] = tensor.detach(), window_of(tensor) or _NoWindow
        self.aliases, self._windows = aliases, windows
        self._addresses, self._sizes = addresses, sizes

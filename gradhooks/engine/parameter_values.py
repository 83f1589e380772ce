"""ParameterValues: values of parameters that a forward changes without a gradient.

Frozen parameters that follow others (teachers, key encoders), `self.weight.data = ...` and `self.weight.data.mul_()` in
a forward. Copies of all parameters at each step would be too expensive, so which ones a forward changes is found out:

Rules:
    1. Before the first forward, and the first one in another mode (training flags), small trainable parameters (1 KiB)
       are copied, and as many frozen ones as need no more memory than all trainable ones or 64 MiB; all trainable ones
       only on request, since it costs memory while the first pose runs. Whole contents are compared in the
       next snapshots, of which at least one follows a forward; then the copies of what did not change are dropped.
    2. What changed is copied before each chunk from then on.
    3. The others are watched (`TensorWatch`): version counter, address, number of elements, on the CPU the first 1 KiB.
       Not seen is a write through `.data`, behind these bytes or on a device, that begins only later.
    4. What is seen to change, but was not copied, cannot be restored: an error, once, that names the parameter.
    5. While shadows are in the model, they are recorded: their memory is that of the parameters.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradhooks.engine.tensor_records import HEAD_BYTES, TensorRecord, address_of
from gradhooks.engine.tensor_watch import TensorWatch

_LEAST_BUDGET = 64 << 20
_PROBES = 3  # snapshots: at the beginning of the batch, perhaps once more before the first forward, and after it


class _Slot(NamedTuple):
    """An entry of a module's `_parameters`."""

    parameters: Any
    name: str
    path: str


class ParameterValues:
    """Records and restores the values of parameters.

    Args:
        modules: The modules by path.

    Attributes:
        records: What the parameters held when they were recorded last.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        found: dict[int, _Slot] = {}
        for path, module in modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and address_of(parameter) is not None and not is_lazy(parameter):
                    found.setdefault(id(parameter), _Slot(module._parameters, name, f"{path}.{name}".lstrip(".")))
        self._slots = list(found.values())
        self._tables = [slot.parameters for slot in self._slots]
        self._names = [slot.name for slot in self._slots]
        self._changing: set[int] = set()
        self._probing: set[int] = set()
        self._probes_left = 0
        self._set(())

    def begin(self, *, probe: bool, copy_all: bool = False) -> None:
        """Record all parameters as they are; what changed before was not changed by a forward.

        Args:
            probe: Whether to find out which parameters the next forward changes (Rule 1).
            copy_all: Whether to copy all trainable parameters for this.
        """
        tensors = self._tensors()
        if probe:
            self._probing = _affordable(tensors, copy_all=copy_all) - self._changing
            self._probes_left = _PROBES
        elif not self._changing and self._is_current(tensors):
            return
        copied = self._changing | self._probing
        records: Sequence[TensorRecord | None] = self.records or [None] * len(tensors)
        self._set(
            record.with_new_values()
            if record is not None and record.tensor is tensor and index not in copied
            else TensorRecord(tensor, with_values=index in copied)
            for index, (tensor, record) in enumerate(zip(tensors, records, strict=True))
        )

    @property
    def change_count(self) -> int:
        """The number of parameters that are known to change."""
        return len(self._changing)

    @property
    def changing(self) -> list[Tensor]:
        """The parameters that are known to change, as they are in the model now."""
        return [self._slots[index].parameters[self._slots[index].name] for index in self._changing]

    def snapshot_changing(self) -> tuple[TensorRecord, ...]:
        """Return the records of now, under the assumption that no other parameters change than those known to."""
        return self.snapshot() if self._probing or self._changing else self.records

    def snapshot(self) -> tuple[TensorRecord, ...]:
        """Return the records of now: those of before, if no parameter changed."""
        tensors = self._tensors()
        probed = self._probing
        if not probed and not self._changing and self._is_current(tensors):
            return self.records
        records = list(self.records)
        for index, (record, tensor) in enumerate(zip(self.records, tensors, strict=True)):
            if tensor is not record.tensor and tensor.requires_grad:  # shadows were put in, or taken out
                copied = index in self._changing or index in probed
                shares = not copied and address_of(tensor) == record.address
                records[index] = record.of_alias(tensor) if shares else TensorRecord(tensor, with_values=copied)
                continue
            kept = tensor is record.tensor and record.looks_unchanged()
            compared = index in probed or index in self._changing
            if kept and not (compared and not record.has_same_values()):
                continue
            if compared and tensor is record.tensor and record.looks_in_place() and record.has_same_values():
                records[index] = record.renewed()  # only the counter moved
            else:
                records[index] = TensorRecord(tensor, with_values=True)
            self._changing.add(index)
        self._end_probe()
        if any(new is not old for new, old in zip(records, self.records, strict=True)):
            self._set(records)
        return self.records

    def restore(self, records: Sequence[TensorRecord]) -> list[str]:
        """Give parameters the values of a snapshot; return the names of those whose values are lost (Rule 4)."""
        if self._probing:
            self.snapshot()  # marks what changed
        if records is self.records and not self._changing and self._watch.unchanged():
            return []
        lost = []
        for index, (slot, record, present) in enumerate(zip(self._slots, records, self.records, strict=True)):
            if not slot.parameters[slot.name].requires_grad and not record.tensor.requires_grad:
                slot.parameters[slot.name] = record.tensor
            needs_no_copy = record.value is None or (record is present and record.shows_all)
            if not (needs_no_copy and record.looks_unchanged()) and not record.restore():
                lost.append(slot.path)
                self._changing.add(index)
        self._set(record if record.looks_unchanged() else record.renewed() for record in records)
        return lost

    def overwrite(self, records: Sequence[TensorRecord]) -> None:
        """Give parameters the values of a snapshot as far as there are copies, whatever was recorded since."""
        for slot, record in zip(self._slots, records, strict=True):
            if not record.tensor.requires_grad:  # trainable ones may have been recorded as shadows
                slot.parameters[slot.name] = record.tensor
            record.restore()

    def end_probe(self) -> None:
        """Drop the copies of parameters that did not change; a forward has run."""
        self._probes_left = min(1, self._probes_left)
        self.snapshot()

    def _end_probe(self) -> None:
        self._probes_left = max(0, self._probes_left - 1)
        self._probing -= self._changing
        if self._probes_left == 0:
            for index in self._probing:
                self.records[index].value = None
            self._probing = set()

    def _tensors(self) -> list[Tensor]:
        return list(map(operator.getitem, self._tables, self._names))

    def _is_current(self, tensors: list[Tensor]) -> bool:
        return all(map(operator.is_, self._recorded, tensors)) and self._watch.unchanged()

    def _set(self, records: Iterable[TensorRecord]) -> None:
        self.records = tuple(records)
        self._recorded = [record.tensor for record in self.records]
        self._watch = TensorWatch(self.records)


def carry_over_data(parameters: Iterable[Tensor], shadows: Iterable[Tensor]) -> None:
    """Give each parameter what a forward gave its shadow: memory (`self.weight.data = ...`), `requires_grad`.

    To be called after the first run. A write into the memory needs nothing, since a shadow shares it.
    """
    for parameter, shadow in zip(parameters, shadows, strict=True):
        if address_of(parameter) != address_of(shadow) or (
            address_of(shadow) is not None and not parameter.is_set_to(shadow)
        ):
            parameter.data = shadow.data
        if parameter.is_leaf and parameter.requires_grad != shadow.requires_grad:
            parameter.requires_grad_(shadow.requires_grad)


def _affordable(tensors: list[Tensor], *, copy_all: bool) -> set[int]:
    """Return which parameters are copied to find out whether a forward changes them (Rule 1)."""
    trainable = {index for index, tensor in enumerate(tensors) if tensor.requires_grad}
    budget = max(_LEAST_BUDGET, sum(tensors[index].nbytes for index in trainable))
    chosen = {index for index in trainable if copy_all or tensors[index].nbytes <= HEAD_BYTES}
    for index, tensor in enumerate(tensors):
        if index not in trainable and tensor.nbytes <= budget:
            chosen.add(index)
            budget -= tensor.nbytes
    return chosen

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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradhooks.engine.parameter_records import ParameterRecords, ValueCopy
from gradhooks.engine.tensor_records import HEAD_BYTES, address_of
from gradhooks.engine.tensor_signs import SignReader, Signs

_requires_grad = operator.attrgetter("requires_grad")
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
        self._readers: list[SignReader] = []  # of the parameters, and of their shadows
        reader = self._reader()
        self.records = ParameterRecords(reader, reader.read(), {})

    def begin(self, *, probe: bool, copy_all: bool = False) -> None:
        """Record all parameters as they are; what changed before was not changed by a forward.

        Args:
            probe: Whether to find out which parameters the next forward changes (Rule 1).
            copy_all: Whether to copy all trainable parameters for this.
        """
        reader = self._reader()
        if probe:
            self._probing = _affordable(reader.tensors, copy_all=copy_all) - self._changing
            self._probes_left = _PROBES
        signs, copied = reader.read(), self._changing | self._probing
        if copied or self.records.copies or not self._is_recorded(reader, signs):
            copies = {index: ValueCopy(reader.tensors[index]) for index in copied}
            self.records = ParameterRecords(reader, signs, copies)

    @property
    def change_count(self) -> int:
        """The number of parameters that are known to change."""
        return len(self._changing)

    @property
    def changing(self) -> list[Tensor]:
        """The parameters that are known to change, as they are in the model now."""
        return [self._slots[index].parameters[self._slots[index].name] for index in self._changing]

    def snapshot_changing(self) -> ParameterRecords:
        """Return the records of now, under the assumption that no other parameters change than those known to."""
        return self.snapshot() if self._probing or self._changing else self.records

    def snapshot(self) -> ParameterRecords:
        """Return the records of now: those of before, if no parameter changed."""
        reader = self._reader()
        signs = reader.read()
        if not self._probing and not self._changing and self._is_recorded(reader, signs):
            return self.records
        copies = dict(self.records.copies)
        for index in self._differing(reader, signs):
            self._record(index, reader.tensors[index], signs, copies)
        self._end_probe()
        if copies != self.records.copies or not self._is_recorded(reader, signs):
            self.records = ParameterRecords(reader, signs, copies)
        return self.records

    def _differing(self, reader: SignReader, signs: Signs) -> Sequence[int]:
        """Return the parameters that may differ from their record."""
        if self._probing or self._changing or signs != self.records.signs:
            return range(len(reader.tensors))
        same = map(operator.is_, reader.tensors, self.records.tensors)
        return [index for index, is_same in enumerate(same) if not is_same and not signs.flags[index]]

    def _record(self, index: int, tensor: Tensor, signs: Signs, copies: dict[int, ValueCopy]) -> None:
        """Take note of what a parameter holds now; copy it if a forward changes it, or if this is to be found out."""
        known = self.records
        is_compared = index in self._probing or index in self._changing
        is_recorded = tensor is known.tensors[index]
        if not is_recorded and tensor.requires_grad:  # shadows were put in, or taken out
            copies.pop(index, None)
            if is_compared:
                copies[index] = ValueCopy(tensor)
            return
        is_same = is_recorded and signs.is_same(known.signs, index)
        has_same_values = is_compared and is_recorded and known.has_same_values(index)
        if is_same and (has_same_values or not is_compared):
            return
        if not (has_same_values and signs.is_in_place(known.signs, index)):  # else only the counter moved
            copies[index] = ValueCopy(tensor)
        self._changing.add(index)

    def restore(self, records: ParameterRecords) -> list[str]:
        """Give parameters the values of a snapshot; return the names of those whose values are lost (Rule 4)."""
        if self._probing:
            self.snapshot()  # marks what changed
        now = records.signs_of_now()
        if records is self.records and not self._changing and now == records.signs:
            return []
        lost = []
        for index, (slot, tensor) in enumerate(zip(self._slots, records.tensors, strict=True)):
            if not slot.parameters[slot.name].requires_grad and not tensor.requires_grad:
                slot.parameters[slot.name] = tensor
            if not records.restore(index, now):
                lost.append(slot.path)
                self._changing.add(index)
        now = records.signs_of_now()
        self.records = records if now == records.signs else records.renewed(now)
        return lost

    def overwrite(self, records: ParameterRecords) -> None:
        """Give parameters the values of a snapshot as far as there are copies, whatever was recorded since."""
        now = records.signs_of_now()
        for index, (slot, tensor) in enumerate(zip(self._slots, records.tensors, strict=True)):
            if not tensor.requires_grad:  # trainable ones may have been recorded as shadows
                slot.parameters[slot.name] = tensor
            records.restore(index, now)

    def end_probe(self) -> None:
        """Drop the copies of parameters that did not change; a forward has run."""
        self._probes_left = min(1, self._probes_left)
        self.snapshot()

    def _end_probe(self) -> None:
        self._probes_left = max(0, self._probes_left - 1)
        self._probing -= self._changing
        if self._probes_left == 0:
            for index in self._probing:
                if index in self.records.copies:
                    self.records.copies[index].value = None
            self._probing = set()

    def _reader(self) -> SignReader:
        """Return the reader of the parameters that are in the model now."""
        tensors = list(map(operator.getitem, self._tables, self._names))
        for reader in self._readers:
            if all(map(operator.is_, reader.tensors, tensors)):
                return reader
        self._readers = [*self._readers[-1:], SignReader(tensors)]
        return self._readers[-1]

    def _is_recorded(self, reader: SignReader, signs: Signs) -> bool:
        return reader.tensors is self.records.tensors and signs == self.records.signs


def carry_over_data(parameters: Sequence[Tensor], shadows: Sequence[Tensor]) -> None:
    """Give each parameter what a forward gave its shadow: memory (`self.weight.data = ...`), `requires_grad`.

    To be called after the first run. A write into the memory needs nothing, since a shadow shares it.
    """
    try:
        if all(map(Tensor.is_set_to, parameters, shadows)) and all(map(_requires_grad, shadows)):
            return
    except RuntimeError:  # tensors without storage
        pass
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

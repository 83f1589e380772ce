"""ParameterRecords: what parameters held at one time."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from gradhooks.engine.tensor_records import HEAD_BYTES, equal_values
from gradhooks.engine.tensor_signs import SignReader, Signs


class ValueCopy:
    """A copy of the values of a parameter, shared by the records between which they did not change.

    Attributes:
        value: The copy; None after it was dropped.
    """

    __slots__ = ("value",)

    def __init__(self, tensor: Tensor) -> None:
        self.value: Tensor | None = tensor.detach().clone()


class ParameterRecords:
    """What parameters held at one time. Never changed, except that copies are dropped.

    Args:
        reader: Reads the signs of the parameters.
        signs: The signs at this time.
        copies: Copies of the values of some parameters, by index.

    Attributes:
        tensors: The parameters, or the shadows in their places.
        signs: The signs at this time.
        copies: Copies of values, by index.
    """

    __slots__ = ("_aliases", "_reader", "copies", "signs", "tensors")

    def __init__(self, reader: SignReader, signs: Signs, copies: Mapping[int, ValueCopy]) -> None:
        self._reader = reader
        self._aliases: Sequence[Tensor] = reader.aliases
        self.tensors = reader.tensors
        self.signs = signs
        self.copies = copies

    def signs_of_now(self) -> Signs:
        """Return the signs that the same tensors have now."""
        return self._reader.read()

    def renewed(self, signs: Signs) -> "ParameterRecords":
        """Return records with other signs of the same tensors, in the same memory and with the same values."""
        records = ParameterRecords(self._reader, signs, self.copies)
        records._aliases = self._aliases
        return records

    def has_same_values(self, index: int) -> bool:
        """Return whether a parameter has the values that were copied. Waits for the device."""
        copy = self.copies.get(index)
        return copy is not None and copy.value is not None and equal_values(self.tensors[index].detach(), copy.value)

    def restore(self, index: int, now: Signs) -> bool:
        """Put a parameter back as it was (`tensor_records.py`, Rule 2); return whether this was possible.

        Args:
            index: The number of the parameter.
            now: The signs that the tensors have now.
        """
        copy = self.copies.get(index)
        value = None if copy is None else copy.value
        if (value is None or self._shows_all(index)) and self.signs.is_same(now, index):
            return True
        tensor, alias = self.tensors[index], self._aliases[index]
        if tensor.is_leaf and tensor.requires_grad != self.signs.flags[index]:
            tensor.requires_grad_(self.signs.flags[index])
        if not tensor.is_set_to(alias):
            tensor.data = alias
        if value is not None:
            tensor.data.copy_(value)
            return True
        return self.signs.is_in_place(self.signs_of_now(), index)

    def _shows_all(self, index: int) -> bool:
        return self.signs.heads[index] is not None and self.tensors[index].nbytes <= HEAD_BYTES

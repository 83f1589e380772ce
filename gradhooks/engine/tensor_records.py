"""TensorRecord: a tensor's memory, values and `requires_grad` at one time.

Rules:
    1. What is looked at without cost: the version counter; `requires_grad`; the address and number of the elements
       (`.data = ...`); on the CPU the first bytes, so that small tensors are compared wholly. `.data.mul_()`, the
       kernels of normalization and TorchScript do not increment the counter: of tensors that are larger, or on a
       device, this shows in a comparison of the whole content only.
    2. Values are restored through `.data`, which leaves version counters unchanged: graphs that saved the tensor stay
       valid. A tensor whose memory was replaced gets its own memory back.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

HEAD_BYTES = 1024
_PLAIN_TYPES = {Tensor, nn.Parameter, getattr(nn, "Buffer", nn.Parameter)}


class TensorRecord:
    """A tensor's memory, values and `requires_grad` at one time.

    Args:
        tensor: The tensor.
        with_values: Whether to copy the values, without which they cannot be restored.

    Attributes:
        tensor: The tensor.
        alias: The memory that it had.
        value: A copy of its values, or None.
        requires_grad: Whether it required grad.
    """

    __slots__ = ("address", "alias", "head", "requires_grad", "tensor", "value", "version", "window")

    def __init__(self, tensor: Tensor, *, with_values: bool) -> None:
        self.tensor = tensor
        self.alias = tensor.detach()
        self.version = version_of(tensor)
        self.requires_grad = tensor.requires_grad
        self.address = address_of(tensor)
        self.window = window_of(tensor)
        self.head = None if self.window is None else self.window.raw
        self.value = self.alias.clone() if with_values else None

    @property
    def shows_all(self) -> bool:
        """Whether every change shows without comparing the whole content (Rule 1)."""
        return self.window is not None and self.tensor.nbytes <= HEAD_BYTES

    def looks_unchanged(self) -> bool:
        """Return whether nothing shows that the tensor changed (Rule 1)."""
        return self.has_same_flag() and version_of(self.tensor) == self.version and self.looks_in_place()

    def has_same_flag(self) -> bool:
        """Return whether `requires_grad` is unchanged."""
        return self.tensor.requires_grad == self.requires_grad

    def looks_in_place(self) -> bool:
        """Return whether the memory is the same and begins with the same bytes."""
        return address_of(self.tensor) == self.address and (self.window is None or self.window.raw == self.head)

    def has_same_values(self) -> bool:
        """Return whether the tensor has the values that were copied. Waits for the device."""
        return self.value is not None and equal_values(self.tensor.detach(), self.value)

    def renewed(self) -> "TensorRecord":
        """Return a record of now that shares the copy; memory and values must be those of this record."""
        record = object.__new__(TensorRecord)  # copy.copy takes ten times longer
        record.tensor, record.alias, record.value = self.tensor, self.alias, self.value
        record.address, record.window, record.head = self.address, self.window, self.head
        record.version, record.requires_grad = version_of(self.tensor), self.tensor.requires_grad
        return record

    def of_alias(self, tensor: Tensor) -> "TensorRecord":
        """Return a record, without a copy, of another tensor with the same memory and version counter."""
        record = self.renewed()
        record.tensor, record.value = tensor, None
        return record

    def with_new_values(self) -> "TensorRecord":
        """Return a record of now without a copy."""
        if address_of(self.tensor) != self.address:
            return TensorRecord(self.tensor, with_values=False)
        record = self.renewed()
        record.head = None if record.window is None else record.window.raw
        record.value = None
        return record

    def restore(self) -> bool:
        """Give the tensor its memory, values and flag back (Rule 2); return whether this was possible."""
        if self.tensor.is_leaf and not self.has_same_flag():
            self.tensor.requires_grad_(self.requires_grad)
        if self.address is not None and not self.tensor.is_set_to(self.alias):
            self.tensor.data = self.alias
        if self.value is None:
            return self.looks_in_place()
        self.tensor.data.copy_(self.value)
        return True


def version_of(tensor: Tensor) -> int:
    """Return the version counter of a tensor; 0 for an inference tensor, which has none."""
    return 0 if tensor.is_inference() else tensor._version


def address_of(tensor: Tensor) -> tuple[int, int] | None:
    """Return address and number of the elements of an ordinary tensor, None for one without memory of its own."""
    if type(tensor) not in _PLAIN_TYPES or tensor.layout != torch.strided or tensor.is_meta:
        return None
    return tensor.data_ptr(), tensor.numel()


def equal_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors agree in shape, dtype and values, NaN in the same places included."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        return False  # unknown
    may_be_nan = one.is_floating_point() or one.is_complex()
    if one.device.type == "cpu" or not may_be_nan:  # both comparisons would wait for a device twice
        if torch.equal(one, other):
            return True
        if not may_be_nan:
            return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def window_of(tensor: Tensor) -> Any:
    """Return a view of the first bytes of a tensor; None on a device, or without memory of its own."""
    address = address_of(tensor)
    if address is None or tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return None
    return (ctypes.c_char * min(tensor.nbytes, HEAD_BYTES)).from_address(address[0])

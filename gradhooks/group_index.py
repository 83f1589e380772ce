"""GroupIndex: the group of each pose of a batch, validated, in the forms that the steps of a batch need."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GroupIndex:
    """The group of each pose, validated.

    Attributes:
        index: Shape `(M,)`, int64, on the CPU.
        count: B, the number of groups.
    """

    index: Tensor
    count: int

    @cached_property
    def _device_copies(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    @cached_property
    def _order(self) -> Tensor:
        """The poses sorted by group, within a group in their order, shape `(M,)`."""
        with torch.inference_mode(False):
            return self.index.argsort(stable=True)

    @cached_property
    def _is_sorted(self) -> bool:
        return bool((self.index[1:] >= self.index[:-1]).all())

    @cached_property
    def sizes(self) -> list[int]:
        """The number of poses of each group."""
        sizes: list[int] = self.index.bincount(minlength=self.count).tolist()
        return sizes

    def to(self, device: torch.device) -> Tensor:
        """Return the index on a device, shape `(M,)`."""
        return self._copied("index", self.index, device)

    def rows(self) -> list[Tensor]:
        """Return for each group the indices of its poses, in their order, on the CPU."""
        return list(self._order.split(self.sizes))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split a tensor with a row per pose into the rows of each group, in the order of the poses.

        One kernel sorts the rows, so that the backward of all groups together adds to M rows, not each to M.
        """
        if not self._is_sorted:
            tensor = tensor.index_select(0, self._copied("order", self._order, tensor.device))
        parts: tuple[Tensor, ...] = tensor.split(self.sizes)
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the rows of each group together, in the order of the poses: the inverse of `split`."""
        joined = torch.cat(list(parts))
        if self._is_sorted:
            return joined
        return joined.index_select(0, self._copied("places", self._order.argsort(), joined.device))

    def select(self, rows: Tensor | slice) -> "GroupIndex":
        """Return the index of some poses; the number of groups stays."""
        return GroupIndex(self.index[rows.cpu() if isinstance(rows, Tensor) else rows], self.count)

    def _copied(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        if device == tensor.device:
            return tensor
        key = (name, device)
        if key not in self._device_copies:
            with torch.inference_mode(False):  # a tensor of inference mode cannot be saved for a later backward
                self._device_copies[key] = tensor.to(device, non_blocking=True)
        return self._device_copies[key]

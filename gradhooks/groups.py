"""Groups: the poses of a batch together with the groups that they belong to."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import register_pytree_node, tree_map

from gradhooks.engine.nested import map_tensors
from gradhooks.group_validation import as_integers
from gradhooks.padded_batch import unpad


@dataclass(eq=False)  # not frozen: Lightning converts the dtype of a batch by assigning to the fields of a copy
class Groups:
    """The poses of a batch and their groups: `scorer(groups)` is `scorer(groups.poses, groups=groups.index)`.

    It passes through the workers of a DataLoader, and trainers move it to a device. `len()` is the number of poses.

    Args:
        poses: A list, a generator, a stacked tensor, or a mapping of stacked tensors.
        index: The group of each pose, integers of shape `(M,)`, in any order: a tensor, a list or a numpy array.
        count: B, the number of groups, which are `0 .. B - 1`; the largest number plus one by default. If it is given,
            groups may be empty where the combination accepts that.

    Raises:
        PosesError: `index` does not have shape `(M,)`, or does not hold integers.
    """

    poses: Any
    index: Any
    count: int | None = None

    @classmethod
    def from_padded(cls, poses: Tensor | Mapping[str, Any], mask: Tensor) -> "Groups":
        """Take the poses out of a padded batch.

        >>> groups = Groups.from_padded(patches, mask)  # (B, L, features) and (B, L)
        >>> prediction = scorer(groups)
        >>> padded = torch.zeros_like(mask, dtype=torch.float).masked_scatter(mask, prediction.per_pose)  # (B, L)

        Args:
            poses: Shape `(B, L, ...)`, or a mapping of such tensors. Gradients flow back to them.
            mask: Which of the L places of each group hold a pose: boolean, shape `(B, L)`.

        Returns:
            The poses in the order of the mask, group by group, copied into stacks of shape `(M, ...)`. `count` is B, so
            that a group without poses is empty.

        Raises:
            PosesError: The mask is not boolean or has another shape than the first two axes of the poses.
        """
        return cls(*unpad(poses, mask))

    def __post_init__(self) -> None:
        self.index = as_integers(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Groups":
        """Return the groups with their poses on a device. The index stays on the CPU, where it is read."""
        device = torch.device(device)
        return dataclasses.replace(self, poses=_call_on_parts(self.poses, "to", device, non_blocking=non_blocking))

    def pin_memory(self) -> "Groups":
        """Return the groups with their poses in pinned memory, from which copies to a device do not wait."""
        return dataclasses.replace(self, poses=_call_on_parts(self.poses, "pin_memory"))


def moved_by_data_parallel(groups: Groups, device: torch.device) -> Groups:
    """Return groups with their poses on the device of the model if DistributedDataParallel has `device_ids`.

    It then moves the tensors of its inputs, but looks into tuples, lists and dicts only, and for no method `to`.

    Args:
        groups: The groups of a call.
        device: The device of the model.
    """
    # Private: there is no other way to know inside which wrapper a forward runs. None outside of one.
    parallel: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if parallel is None or not parallel.device_ids or parallel.device_type != device.type:
        return groups
    return groups.to(device)


def _call_on_parts(value: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of every tensor in `value`, and of every object that has the method itself, as graphs have."""

    def convert(part: Any) -> Any:
        if hasattr(part, method):
            return getattr(part, method)(*arguments, **options)
        return map_tensors(lambda tensor: getattr(tensor, method)(*arguments, **options), part)

    return tree_map(convert, value)


def _flatten(groups: Groups) -> tuple[list[Any], int | None]:
    return [groups.poses, groups.index], groups.count


def _unflatten(parts: Iterable[Any], count: int | None) -> Groups:
    groups = object.__new__(Groups)  # without validation: a pytree may hold anything for a while
    groups.poses, groups.index = parts
    groups.count = count
    return groups


# Where PyTorch and trainers look for the tensors in an input.
register_pytree_node(Groups, _flatten, _unflatten)

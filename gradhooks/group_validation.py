"""Check the group numbers that a user passes."""

import operator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gradhooks.errors import PosesError
from gradhooks.group_index import GroupIndex

SHOWN = 5
"""How many group numbers an error message lists."""


def read_index(groups: Any, pose_count: int) -> Tensor:
    """Return the group of each pose, shape `(M,)`, int64, on the CPU.

    Args:
        groups: What the user passed: a tensor, a list or a numpy array of integers.
        pose_count: M, the number of poses.

    Raises:
        PosesError: The groups do not have shape `(M,)`, are not integers, or one is negative.
    """
    index = as_integers(groups)
    if index.shape[0] != pose_count:
        raise PosesError(f"groups must have one number for each pose, got {len(index)} numbers for {pose_count} poses")
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            index = index.to("cpu", torch.int64, copy=True)
    else:  # without a context, which takes longer than the copy
        index = index.to("cpu", torch.int64, copy=True)
    numbers = index.tolist()
    if pose_count and min(numbers) < 0:
        pose = next(pose for pose, number in enumerate(numbers) if number < 0)
        raise PosesError(f"groups must not be negative: pose {pose} is in group {numbers[pose]}")
    return index


def group_index(index: Tensor, count: int | None, *, empty_allowed: bool, combination_name: str) -> GroupIndex:
    """Check the groups of all poses.

    Args:
        index: The group of each pose, shape `(M,)`, from `read_index`.
        count: B if the user gave it; the largest number plus one by default.
        empty_allowed: Whether the combination accepts groups without poses.
        combination_name: The name of the combination, for messages.

    Raises:
        PosesError: A number is not less than B, or a group has no poses although B is not given or the combination
            does not accept that.
    """
    # A list and a set of M numbers are made faster than the first kernel of each kind in a step starts.
    numbers = index.tolist()
    largest = max(numbers, default=-1)
    number_of_groups = _group_count(largest, count)
    if largest >= number_of_groups:
        pose = next(pose for pose, number in enumerate(numbers) if number >= number_of_groups)
        raise PosesError(
            f"pose {pose} is in group {numbers[pose]}, but count={number_of_groups} allows the groups 0 to "
            f"{number_of_groups - 1}"
        )
    present = set(numbers)
    if len(present) < number_of_groups and not (empty_allowed and count is not None):
        absent = islice((number for number in range(number_of_groups) if number not in present), SHOWN)
        raise PosesError(_describe_missing(list(absent), number_of_groups - len(present), combination_name))
    return GroupIndex(index, number_of_groups)


def _group_count(largest: int, count: int | None) -> int:
    if count is None:
        if largest < 0:
            raise PosesError("the batch is empty: it needs at least one pose, or Groups(poses, index, count)")
        return largest + 1
    return read_count(count)


def read_count(count: Any) -> int:
    """Return the number of groups that a user passes.

    Raises:
        PosesError: It is not an integer of at least 1.
    """
    try:
        number = operator.index(count)
    except TypeError:
        number = 0
    if number < 1 or isinstance(count, bool):
        raise PosesError(f"count must be the number of groups, an integer of at least 1, got {count!r}")
    return number


def _describe_missing(shown: list[int], total: int, combination_name: str) -> str:
    more = f" and {total - SHOWN} more" if total > SHOWN else ""
    return (
        f"no pose is in group {', '.join(map(str, shown))}{more}; number the groups "
        "0 to B - 1 without gaps. A combination with accepts_empty_groups = True gets empty groups by "
        f"Groups(poses, index, count); here it is {combination_name}"
    )


def as_integers(groups: Any) -> Tensor:
    """Return `groups` as a tensor of integers of shape `(M,)`, on its own device.

    Raises:
        PosesError: It is none.
    """
    try:
        # torch.tensor copies: as_tensor would warn about an array of numpy that cannot be written to.
        index = groups if isinstance(groups, Tensor) else torch.tensor(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PosesError(f"groups must be integers of shape (M,), one for each pose, got {groups!r}") from error
    if index.dim() != 1:
        raise PosesError(f"groups must have shape (M,), one number for each pose, got shape {tuple(index.shape)}")
    if index.shape[0] == 0:
        return index.to(torch.int64)  # an empty list becomes float32
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise PosesError(f"groups must be integers, one for each pose, got {index.dtype}")
    return index

"""Sums, means, extrema and softmax over the groups of a batch, for `Combination.forward_groups`.

In all functions `values` has shape `(M, ...)`, a row per pose; `groups` has shape `(M,)`, the group of each pose, int64
in any order; and `count` is B, the number of groups. Each is a few kernels, whatever B is, and none waits for the
device. Numbers that are not finite stay in their own group. The same input gives the same bits in every run.
"""

import torch
from torch import Tensor

from gradhooks.numerics import at_least_float32, per_row

__all__ = [
    "expand_groups",
    "group_logsumexp",
    "group_max",
    "group_mean",
    "group_sizes",
    "group_softmax",
    "group_sum",
]


def expand_groups(values: Tensor, groups: Tensor) -> Tensor:
    """Return for each pose the value of its group, shape `(M, ...)`, from `values` of shape `(B, ...)`."""
    # The backward of either is a sum over groups. On a GPU that of index_select adds in an order that changes.
    return values.index_select(0, groups) if values.device.type == "cpu" else values[groups]


def group_sizes(groups: Tensor, count: int) -> Tensor:
    """Return the number of poses of each group, shape `(B,)`, int64."""
    # Not bincount, which waits for the device.
    return groups.new_zeros(count).index_add(0, groups, torch.ones_like(groups))


def group_sum(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum over each group, shape `(B, ...)`; 0 for an empty group."""
    zeros = values.new_zeros((count, *values.shape[1:]))
    if values.device.type == "cpu":
        return zeros.index_add(0, groups, values)
    # index_add adds in an order that changes from run to run on a GPU; index_put sorts first.
    return zeros.index_put((groups,), values, accumulate=True)


def group_mean(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Take the mean over each group, shape `(B, ...)`; NaN for an empty group."""
    return group_sum(values, groups, count) / per_row(group_sizes(groups, count), values)


def group_max(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the largest value of each group, shape `(B, ...)`; -inf for an empty group.

    Values that are equally large share the gradient, as in `torch.amax`.
    """
    lowest = values.new_full((count, *values.shape[1:]), -torch.inf)
    return lowest.scatter_reduce(0, per_row(groups, values).expand_as(values), values, "amax")


def group_softmax(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Compute the softmax over each group, shape `(M, ...)`, in float32 or wider; returned in the dtype of `values`."""
    wide = values.to(at_least_float32(values.dtype))
    # softmax(x) = exp(x - c) / sum exp(x - c) for any c; with the group's maximum nothing overflows
    exponentials = (wide - expand_groups(group_max(wide.detach(), groups, count), groups)).exp()
    return (exponentials / expand_groups(group_sum(exponentials, groups, count), groups)).to(values.dtype)


def group_logsumexp(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Compute `ln sum exp(values)` over each group, shape `(B, ...)`; -inf for an empty group."""
    limits = torch.finfo(values.dtype)
    # ln sum exp(x) = c + ln sum exp(x - c) for any finite c; with the group's maximum nothing overflows
    shift = group_max(values.detach(), groups, count).clamp(limits.min, limits.max)
    return group_sum((values - expand_groups(shift, groups)).exp(), groups, count).log() + shift

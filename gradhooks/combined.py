"""Combined: what a combination returns that computes more than its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradhooks.group_index import GroupIndex

Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Combined:
    """The result of a combination, and what it computes beside it: attention scores, predictions of the poses.

    A combination may return it in place of a tensor. It becomes `prediction.outputs`, and the first of `per_pose`
    becomes `prediction.attention`. All tensors keep their graphs, so that a loss may use them.

    Attributes:
        result: The combined prediction: shape `(*prediction)` of one group, `(B, *prediction)` of a batch of groups.
        per_pose: Tensors with a row per pose, shape `(N, ...)`, in the order of the poses; in a batch of groups
            `(M, ...)`. One whose shape depends on the size of the group is a tuple of B tensors in a batch.
        per_group: Other tensors, of any shape `(...)`; in a batch `(B, ...)`, or a tuple of B tensors where their
            shapes differ.
    """

    result: Tensor
    per_pose: tuple[Output, ...] = ()
    per_group: tuple[Output, ...] = ()

    def with_all_poses(self, selected: Tensor) -> "Combined":
        """Return it with rows for all poses; the rows of those that were left out are NaN.

        Args:
            selected: Which poses were combined, boolean, shape `(M,)`.
        """
        per_pose = tuple(
            output if isinstance(output, tuple) else _spread(output, selected.to(output.device))
            for output in self.per_pose
        )
        return Combined(self.result, per_pose, self.per_group)


def result_of(combined: Tensor | Combined) -> Tensor:
    """Return the combined prediction of what a combination returned."""
    return combined.result if isinstance(combined, Combined) else combined


def join_groups(parts: Sequence[Tensor | Combined], groups: GroupIndex) -> Tensor | Combined:
    """Join what a combination returned for each of the groups `0 .. B - 1`."""
    result = torch.stack([result_of(part) for part in parts])
    full = [part for part in parts if isinstance(part, Combined)]
    if len(full) < len(parts):
        return result
    return Combined(
        result,
        _join_columns([part.per_pose for part in full], groups.join, first_axis=1),
        _join_columns([part.per_group for part in full], _stack, first_axis=0),
    )


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors))


def _join_columns(
    rows: Sequence[tuple[Output, ...]], join: Callable[[Sequence[Tensor]], Tensor], first_axis: int
) -> tuple[Output, ...]:
    """Join the first output of all groups, the second one, and so on, each by `join` if shapes allow it."""
    joined: list[Output] = []
    for column in zip(*rows, strict=True):
        tensors = [output for output in column if isinstance(output, Tensor)]
        shapes = {tuple(tensor.shape[first_axis:]) for tensor in tensors}
        joined.append(join(tensors) if len(shapes) == 1 else tuple(tensors))
    return tuple(joined)


def _spread(rows: Tensor, selected: Tensor) -> Tensor:
    """Put the rows where `selected` is true, and NaN elsewhere."""
    missing = torch.nan if rows.is_floating_point() else 0
    filled = rows.new_full((len(selected), *rows.shape[1:]), missing)
    return filled.index_put((selected.nonzero().squeeze(1),), rows)

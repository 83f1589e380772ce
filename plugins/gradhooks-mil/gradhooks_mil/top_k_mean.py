"""Mean of the largest predictions."""

import torch
from einops import rearrange
from torch import Tensor

from gradhooks import Combination
from gradhooks.errors import CombinationError
from gradhooks.group_reductions import expand_groups, group_sizes, group_sum


class TopKMean(Combination):
    """Compute the mean of the `k` largest predictions, or of all if there are fewer.

    The coefficients are `1/k` for these poses and 0 for the others. Which poses they are is known only when all
    predictions are, so the combination is not streamable: the `k` poses are run a second time, the others are not.
    Source: Li and Vasconcelos, Multiple instance learning for soft bags via top instances, CVPR 2015.

    Args:
        k: Number of predictions in the mean, at least 1.

    Raises:
        CombinationError: `k` is less than 1.
    """

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        if k < 1:
            raise CombinationError(f"TopKMean: k must be at least 1, got {k}")
        self.k = k

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.topk(min(self.k, len(predictions)), dim=0).values.mean(0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        # Sorted by value and then, stably, by group: the first k of each group are its largest.
        values, order = predictions.sort(dim=0, descending=True)
        groups, order = groups[order].sort(dim=0, stable=True)
        values = values.gather(0, order)
        of_column = groups.reshape(len(groups), -1)[:, 0]  # the same in every column
        sizes = group_sizes(of_column, count)
        starts = sizes.cumsum(0) - sizes
        rank = torch.arange(len(values), device=values.device) - expand_groups(starts, of_column)
        is_kept = rearrange(rank < self.k, "m -> m" + " 1" * (values.dim() - 1)).expand_as(values)
        total = group_sum(torch.where(is_kept, values, 0.0), of_column, count)
        return total / group_sum(is_kept.to(values.dtype), of_column, count)

    def extra_repr(self) -> str:
        return f"k={self.k}"

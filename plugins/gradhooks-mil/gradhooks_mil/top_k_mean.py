from torch import Tensor

from gradhooks import Combination
from gradhooks.errors import CombinationError


class TopKMean(Combination):
    """Mean of the `k` largest predictions, of all where there are fewer.

    Its coefficients are `1/k` for those and 0 for the others. Which they are is known only when all have come, so it is
    not streamable: gradhooks runs the `k` that matter a second time, and no other. Source: Li and Vasconcelos, Multiple
    instance learning for soft bags via top instances, CVPR 2015.

    Args:
        k: How many, at least 1.

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

    def extra_repr(self) -> str:
        return f"k={self.k}"

"""Mean of the largest predictions."""

from torch import Tensor

from gradhooks import Combination
from gradhooks.errors import CombinationError


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

    def extra_repr(self) -> str:
        return f"k={self.k}"

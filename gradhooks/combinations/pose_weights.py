"""The argument `weights=` of the built-in combinations: statistical weights of the poses, given by the user."""

import torch
from torch import Tensor

from gradhooks.errors import CombinationError
from gradhooks.numerics import per_row, to_float64


def log_weights(weights: Tensor | None, predictions: Tensor, *, whole_group: bool = False) -> Tensor:
    """Return the logarithms of the weights in float64, in a shape that broadcasts over the predictions.

    Args:
        weights: Shape `(N,)`, not negative; may be a boolean mask. None stands for weights of 1.
        predictions: Shape `(N, *prediction)`.
        whole_group: Whether these are all poses of the group, so that at least one weight must be positive.

    Raises:
        CombinationError: The weights have another shape, one is negative or NaN, or all weights of a group are 0.
    """
    if weights is None:
        return to_float64(torch.zeros((), device=predictions.device))
    if weights.shape != predictions.shape[:1]:
        raise CombinationError(
            f"weights must have shape ({len(predictions)},), one weight for each pose, got shape {tuple(weights.shape)}"
        )
    numbers = to_float64(weights.to(predictions.device))
    invalid = ~(numbers >= 0)
    if invalid.any():
        raise CombinationError(f"weights must not be negative or NaN, got {numbers[invalid][0].item():g}")
    if whole_group and not (numbers > 0).any():
        raise CombinationError(
            f"all {len(numbers)} weights are 0, so no pose is left to combine; give at least one a positive weight"
        )
    return per_row(numbers.log(), predictions)

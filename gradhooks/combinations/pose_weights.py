import torch
from torch import Tensor

from gradhooks.errors import CombinationError


def widest(numbers: Tensor) -> Tensor:
    """`numbers` in the widest float their device has.

    N numbers cost nothing, and `scale * y` in float32 is rounded by up to 7e-6 of a coefficient at scale 1000.
    """
    return numbers if numbers.device.type == "mps" else numbers.to(torch.float64)


def log_weights(weights: Tensor | None, predictions: Tensor, *, whole_group: bool = False) -> Tensor:
    """Logarithms of the user's weights of the poses, in a shape that broadcasts over the predictions; 0 without any.

    Args:
        weights: Shape `(N,)`, not negative; a boolean mask will do.
        predictions: Shape `(N, *prediction)`.
        whole_group: Whether these are all poses, of which one must weigh something.

    Raises:
        CombinationError: The weights have another shape, one is negative or NaN, or all of a group's are 0.
    """
    if weights is None:
        return widest(torch.zeros((), device=predictions.device))
    if weights.shape != predictions.shape[:1]:
        raise CombinationError(
            f"weights must have shape ({len(predictions)},), one for each pose, got {tuple(weights.shape)}"
        )
    wide = widest(weights.to(predictions.device))
    if not (wide >= 0).all():
        raise CombinationError("weights of poses must not be negative or NaN")
    if whole_group and not (wide > 0).any():
        raise CombinationError(f"all {len(wide)} weights are 0, so that no pose is left to combine")
    return wide.log().view(-1, *[1] * (predictions.dim() - 1))

"""Compare the predictions of a second run with those of the first.

What may differ is half of the digits of the spread of the predictions, and a quarter of the digits of their size:
kernels that add in varying order lose a few digits, a model that draws other random numbers loses all. A batch of one
pose, or of equal ones, has no spread.
"""

import torch
from torch import Tensor

from gradhooks.engine.context import ForwardContext
from gradhooks.errors import ReplayError


def refuse_drift(
    context: ForwardContext, indices: Tensor, second: Tensor, predictions: Tensor, *, packed: bool
) -> None:
    """Raise an error if a second run gave other predictions than the first. Waits for the device once.

    Args:
        context: The intercepted poses.
        indices: Shape `(n,)`: which poses ran again.
        second: Shape `(n, *prediction)`: their predictions in the second run.
        predictions: Shape `(N, *prediction)`: the predictions of all poses in the first run.
        packed: Whether the poses ran in other chunks than the first time.

    Raises:
        ReplayError: A prediction differs by more than rounding explains.
    """
    first = predictions[indices.to(predictions.device, non_blocking=True)]
    drifts = _differences(first, second)
    eps = torch.finfo(predictions.dtype).eps
    # Packed poses have other neighbours in their chunk; that changes only the last digits, unless the prediction really
    # depends on them.
    rounding = (
        max(torch.finfo(dtype).eps for dtype in (predictions.dtype, *context.batch.autocast.dtypes)) if packed else eps
    )
    size = torch.where(predictions.isfinite(), predictions, 0).abs().max()
    allowed = rounding**0.75 * size + (0 if packed else eps**0.5 * spread(predictions))
    drifted: list[bool] = (drifts > allowed).reshape(len(indices), -1).any(1).tolist()
    if any(drifted):
        worst = drifted.index(True)
        raise ReplayError(
            f"pose {indices[worst]} of {len(context.poses)}: its second run differs from its first by "
            f"{drifts[worst].max().item():.3g}; the model depends on something that is not restored (a random "
            "generator that is no attribute of a module, state in another object, a pose changed in place). Name its "
            "generators with generators=[...], or use accumulator='store', which runs every pose once"
        )


def spread(predictions: Tensor) -> Tensor:
    """Return the range of each component over the poses, shape `(*prediction)`, of the finite ones; 0 without any.

    The range, not the size, is the scale on which poses differ: total energies of -3000 may vary by 1.
    """
    finite = predictions.isfinite()
    largest = torch.where(finite, predictions, -torch.inf).amax(0)
    smallest = torch.where(finite, predictions, torch.inf).amin(0)
    return (largest - smallest).clamp(min=0)


def _differences(first: Tensor, second: Tensor) -> Tensor:
    """Return how far predictions differ: 0 where the first is not finite, infinity where only the second is not."""
    differences = torch.where(second.isfinite(), (second - first).abs(), torch.inf)
    return torch.where(first.isfinite(), differences, 0)

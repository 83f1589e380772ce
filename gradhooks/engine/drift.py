"""Compare the predictions of a second run with those of the first."""

import torch
from torch import Tensor

from gradhooks.engine.context import ForwardContext
from gradhooks.errors import ReplayError


def refuse_drift(
    context: ForwardContext, indices: Tensor, second: Tensor, predictions: Tensor, *, packed: bool
) -> None:
    """Raise an error if a second run gave other predictions than the first. Waits for the device once.

    Args:
        context: The group.
        indices: Shape `(n,)`: which poses ran again.
        second: Shape `(n, *prediction)`: their predictions in the second run.
        predictions: Shape `(N, *prediction)`: the predictions of all poses in the first run.
        packed: Whether the poses ran in other chunks than the first time.

    Raises:
        ReplayError: A prediction differs by more than rounding explains.
    """
    first = predictions[indices.to(predictions.device)]
    drifts = (second - first).abs().reshape(len(indices), -1).amax(1).nan_to_num(nan=0.0)
    # Half of the digits: kernels that add in varying order lose a few digits, a model that draws other random numbers
    # loses all. Packed poses have other neighbours in their chunk; that changes only the last digits, unless the
    # prediction really depends on them.
    coarsest = max(torch.finfo(dtype).eps for dtype in (predictions.dtype, *context.batch.autocast.dtypes))
    allowed = coarsest**0.75 if packed else torch.finfo(predictions.dtype).eps ** 0.5
    drifted = (drifts > allowed * predictions.abs().nan_to_num(0, 0, 0).max()).tolist()
    if any(drifted):
        worst = drifted.index(True)
        raise ReplayError(
            f"pose {indices[worst]} of {len(context.poses)}: its second run differs from its first by "
            f"{drifts[worst].item():.3g}; the model depends on something that is not restored (random numbers of "
            "Python or numpy, a generator of its own, a pose changed in place). Name its generators with "
            "generators=[...], or use accumulator='store', which runs every pose once"
        )

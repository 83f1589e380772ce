"""The full graph: slow and obviously correct, for tests to compare with."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.combined import result_of
from gradhooks.numerics import at_least_float32
from gradhooks.options import Call, call_model
from gradhooks.prediction import MultiPosePrediction


def full_graph(
    model: nn.Module,
    poses: Iterable[Any],
    combination: Callable[[Tensor], Tensor],
    groups: Sequence[int] | Tensor | None = None,
    *,
    call: Call = call_model,
) -> MultiPosePrediction:
    """Compute in plain PyTorch what `MultiPose` computes: one forward for each pose in one graph, all of it in memory.

    Args:
        model: The bare model.
        poses: The poses, one by one.
        combination: Maps predictions of shape `(N, *prediction)` to the combined prediction.
        groups: The group of each pose, `0 .. B - 1`, all with poses. By default the poses are one group.
        call: Passes a pose to the model and returns the prediction.

    Returns:
        The combined prediction, for each group if there are groups, and the predictions of the poses, in one graph.
    """
    predictions = torch.stack([call(model, pose) for pose in poses])
    wide = predictions.to(at_least_float32(predictions.dtype))
    if groups is None:
        return MultiPosePrediction(result_of(combination(wide)), predictions)
    index = torch.as_tensor(groups, device=wide.device)
    combined = [result_of(combination(wide[index == number])) for number in range(int(index.max()) + 1)]
    return MultiPosePrediction(torch.stack(combined), predictions)

"""The full graph: slow and obviously correct, for tests to compare with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.numerics import at_least_float32
from gradhooks.options import Call, call_model
from gradhooks.prediction import MultiPosePrediction


def full_graph(
    model: nn.Module, poses: Iterable[Any], combination: Callable[[Tensor], Tensor], *, call: Call = call_model
) -> MultiPosePrediction:
    """Compute in plain PyTorch what `MultiPose` computes: N forwards in one graph, all of it in memory.

    Args:
        model: The bare model.
        poses: The poses of the group, one by one.
        combination: Maps predictions of shape `(N, *prediction)` to the combined prediction.
        call: Passes a pose to the model and returns the prediction.

    Returns:
        The combined prediction and the predictions of the poses, in one graph.
    """
    predictions = torch.stack([call(model, pose) for pose in poses])
    return MultiPosePrediction(combination(predictions.to(at_least_float32(predictions.dtype))), predictions)

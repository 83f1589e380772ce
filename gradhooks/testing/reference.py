"""The slow, obviously right oracle that tests compare with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.engine.model_call import Call, call_model
from gradhooks.prediction import MultiPosePrediction


def full_graph(
    model: nn.Module, poses: Iterable[Any], combination: Callable[[Tensor], Tensor], *, call: Call = call_model
) -> MultiPosePrediction:
    """What `MultiPose` stands for, in plain PyTorch: N forwards, one graph, all of it in memory.

    Args:
        model: The bare model.
        poses: The group, pose by pose.
        combination: From predictions of shape `(N, *prediction)` to the combined one.
        call: How a pose reaches the model.

    Returns:
        The combined prediction and the pose predictions, in one graph.
    """
    predictions = torch.stack([call(model, pose) for pose in poses])
    wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    return MultiPosePrediction(combination(wide), predictions)

"""CheckedBatch: what a user passes to `gradcheck`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradhooks.prediction import MultiPosePrediction

CheckedLoss = Callable[[MultiPosePrediction], Tensor] | Callable[[MultiPosePrediction, Any], Tensor]


@dataclass(frozen=True)
class CheckedBatch:
    """What a user passes to `gradcheck`.

    Attributes:
        model: The bare model.
        poses: A list of poses, a stacked tensor, a mapping of stacked tensors, or `Groups`.
        combination: As for `MultiPose`.
        groups: The group of each pose, if `poses` are not `Groups`.
        loss: Of a prediction, or of a prediction and the model.
        options: Further options of `MultiPose`.
        wide: Whether to copy numbers in float32 or less as float64.
    """

    model: nn.Module
    poses: Any
    combination: Any
    groups: Any
    loss: CheckedLoss
    options: Mapping[str, Any]
    wide: bool = True


def takes_model(loss: Callable[..., Tensor]) -> bool:
    """Return whether a loss wants a second argument, the model."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # a function of C
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters) > 1

"""The ways to do one training step on a group: what people do today, and gradhooks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradhooks import registry
from gradhooks.accumulators.base import Accumulator
from gradhooks.engine.model_call import Call, call_model
from gradhooks.engine.report import Report
from gradhooks.prediction import MultiPosePrediction
from gradhooks.testing import full_graph
from gradhooks.wrapper import MultiPose

Loss = Callable[[MultiPosePrediction], Tensor]


class Way(NamedTuple):
    """One way.

    Attributes:
        name: What to call it in a table.
        forward: Predicts the group, as part of a graph.
        report: What became of the poses in the last step, None where nobody counts.
    """

    name: str
    forward: Callable[[], MultiPosePrediction]
    report: Callable[[], Report | None]


def all_ways(
    model: nn.Module,
    poses: Sequence[Any],
    combination: str | Callable[[Tensor], Tensor],
    accumulators: Sequence[str | Accumulator],
    **options: Any,
) -> list[Way]:
    """The full graph first, then a checkpoint for each pose, then the accumulators.

    Args:
        model: The bare model.
        poses: A list of poses.
        combination: As for `MultiPose`.
        accumulators: Names or objects.
        **options: Further options of `MultiPose`.
    """
    shared = registry.combinations.resolve(combination)
    call: Call = options.get("call") or call_model
    ways = [
        Way("full graph", lambda: full_graph(model, poses, shared, call=call), _nothing),
        Way("checkpoint per pose", lambda: full_graph(model, poses, shared, call=_checkpointed(call)), _nothing),
    ]
    for accumulator in accumulators:
        scorer = MultiPose(model, shared, accumulator=accumulator, **options)
        name = str(scorer.accumulator)
        ways.append(Way(name, lambda scorer=scorer: scorer(poses), lambda scorer=scorer: scorer.report))  # type: ignore[misc]
    return ways


def total(prediction: MultiPosePrediction) -> Tensor:
    """The loss where none is given: the sum of the combined prediction."""
    return prediction.combined.sum()


def _checkpointed(call: Call) -> Call:
    def checkpointed(model: nn.Module, pose: Any) -> Tensor:
        prediction: Tensor = checkpoint(call, model, pose, use_reentrant=False)
        return prediction

    return checkpointed


def _nothing() -> None:
    return None

"""The ways to run one training step of a group: the full graph, a checkpoint per pose, and accumulators."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradhooks import registry
from gradhooks.accumulators.base import Accumulator
from gradhooks.engine.report import Report
from gradhooks.options import Call, call_model
from gradhooks.prediction import MultiPosePrediction
from gradhooks.testing import full_graph
from gradhooks.wrapper import MultiPose

Loss = Callable[[MultiPosePrediction], Tensor]
CombinationLike = str | Callable[..., Tensor]


class TrainingStep(NamedTuple):
    """One way to run a training step.

    Attributes:
        name: Its name in a table.
        forward: Predicts the group with a graph.
        report: Returns the report of the last step; None for steps without gradhooks.
    """

    name: str
    forward: Callable[[], MultiPosePrediction]
    report: Callable[[], Report | None]


def training_steps(
    model: nn.Module,
    poses: Sequence[Any],
    combination: CombinationLike,
    accumulators: Sequence[str | Accumulator],
    **options: Any,
) -> list[TrainingStep]:
    """Return the full graph, `torch.utils.checkpoint` per pose, and one step per accumulator.

    Args:
        model: The bare model.
        poses: A list of poses.
        combination: As for `MultiPose`.
        accumulators: Names or objects.
        **options: Further options of `MultiPose`; an accumulator that ignores one of them runs without it.
    """
    combination = registry.combinations.resolve(combination)  # all steps share one object
    call: Call = options.get("call") or call_model
    resolved = [registry.accumulators.resolve(accumulator) for accumulator in accumulators]
    return [
        full_graph_step(model, poses, combination, call),
        checkpoint_step(model, poses, combination, call),
        *(accumulator_step(model, poses, combination, each, **_used(options, each, resolved)) for each in resolved),
    ]


def _used(options: dict[str, Any], accumulator: Accumulator, compared: Sequence[Accumulator]) -> dict[str, Any]:
    """Return the options without those that `accumulator` ignores, if another one uses them.

    `MultiPose` refuses an option that its accumulator ignores, and so refuses an option that all ignore.
    """
    used = {name for name in options if any(name not in other.ignored_options for other in compared)}
    return {name: value for name, value in options.items() if name not in accumulator.ignored_options & used}


def full_graph_step(
    model: nn.Module, poses: Sequence[Any], combination: Callable[..., Tensor], call: Call = call_model
) -> TrainingStep:
    """Return the step that keeps the graph of all poses."""
    return TrainingStep("full graph", lambda: full_graph(model, poses, combination, call=call), _no_report)


def checkpoint_step(
    model: nn.Module, poses: Sequence[Any], combination: Callable[..., Tensor], call: Call = call_model
) -> TrainingStep:
    """Return the step that wraps each pose in `torch.utils.checkpoint`."""

    def checkpointed(model: nn.Module, pose: Any) -> Tensor:
        prediction: Tensor = checkpoint(call, model, pose, use_reentrant=False)
        return prediction

    return TrainingStep(
        "checkpoint per pose", lambda: full_graph(model, poses, combination, call=checkpointed), _no_report
    )


def accumulator_step(
    model: nn.Module,
    poses: Sequence[Any],
    combination: CombinationLike,
    accumulator: str | Accumulator,
    *,
    name: str | None = None,
    **options: Any,
) -> TrainingStep:
    """Return the step of a `MultiPose` with an accumulator.

    Args:
        model: The bare model.
        poses: A list of poses.
        combination: As for `MultiPose`.
        accumulator: A name or an object.
        name: Name in a table; that of the accumulator by default.
        **options: Further options of `MultiPose`.
    """
    scorer = MultiPose(model, combination, accumulator=accumulator, **options)
    return TrainingStep(name or str(scorer.accumulator), lambda: scorer(poses), lambda: scorer.report)


def sum_of_combined(prediction: MultiPosePrediction) -> Tensor:
    """Return the default loss: the sum of the combined prediction."""
    return prediction.combined.sum()


def _no_report() -> None:
    return None

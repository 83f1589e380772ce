"""The ways to run one training step of a batch: full graphs, checkpoints, offloading, and `MultiPose`."""

from collections.abc import Callable, Iterator, Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from gradhooks import registry
from gradhooks.accumulators.base import Accumulator
from gradhooks.engine.report import Report
from gradhooks.numerics import at_least_float32
from gradhooks.options import Nonfinite
from gradhooks.prediction import MultiPosePrediction, combine
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.testing import full_graph
from gradhooks.wrapper import MultiPose

Loss = Callable[[MultiPosePrediction], Tensor]


class TrainingStep(NamedTuple):
    """One way to run a training step.

    Attributes:
        name: Its name in a table.
        forward: Predicts the batch with a graph.
        report: Returns the report of the last step; None for steps without gradhooks.
    """

    name: str
    forward: Callable[[], MultiPosePrediction]
    report: Callable[[], Report | None]


def training_steps(
    batch: TrainingBatch, budgets: Sequence[str | float], accumulators: Sequence[str | Accumulator], **options: Any
) -> list[TrainingStep]:
    """Return the full graph, what PyTorch offers to save memory, and `MultiPose` in each way.

    Args:
        batch: The model and its poses.
        budgets: Values of the option `memory`, a step for each.
        accumulators: Names or objects, a step for each.
        **options: Further options of `MultiPose`; an accumulator that ignores one of them runs without it.
    """
    return [
        full_graph_step(batch),
        *_pytorch_steps(batch, options.get("chunk_size")),
        *(
            multipose_step(batch, name=f"MultiPose, memory={memory}", **{**options, "memory": memory})
            for memory in budgets
        ),
        *accumulator_steps(batch, accumulators, **options),
    ]


def _pytorch_steps(batch: TrainingBatch, chunk_size: int | None) -> Iterator[TrainingStep]:
    count = len(batch.inputs)
    batched = batch.inputs.batched and count > 1
    if batched:
        yield batched_step(batch)
    if next(batch.model.parameters()).device.type == "cuda":
        yield offloaded_step(batch)
    yield checkpoint_step(batch)
    if batched:
        yield checkpoint_step(batch, chunk_size or isqrt(count - 1) + 1)


def accumulator_steps(
    batch: TrainingBatch, accumulators: Sequence[str | Accumulator], **options: Any
) -> list[TrainingStep]:
    """Return a step for each accumulator; one that ignores some of the options runs without them."""
    resolved = [registry.accumulators.resolve(accumulator) for accumulator in accumulators]
    return [multipose_step(batch, accumulator=each, **used_options(options, each, resolved)) for each in resolved]


def used_options(options: dict[str, Any], accumulator: Accumulator, compared: Sequence[Accumulator]) -> dict[str, Any]:
    """Return the options without those that `accumulator` ignores, if another one uses them.

    `MultiPose` refuses an option that its accumulator ignores, and so refuses an option that all ignore.
    """
    used = {name for name in options if any(name not in other.ignored_options for other in compared)}
    return {name: value for name, value in options.items() if name not in accumulator.ignored_options & used}


def full_graph_step(batch: TrainingBatch) -> TrainingStep:
    """Return the step that runs pose by pose and keeps the graph of all poses."""
    return TrainingStep("full graph", lambda: full_graph_prediction(batch), _no_report)


def full_graph_prediction(
    batch: TrainingBatch, chunk_size: int = 1, nonfinite: Nonfinite = "propagate"
) -> MultiPosePrediction:
    """Return the prediction of one graph of all poses, in plain PyTorch.

    Args:
        batch: The model and its poses.
        chunk_size: Poses per call of the model; 1 for lists that cannot be collated.
        nonfinite: With "drop", poses without a finite prediction are left out, and their graphs too.
    """
    size = chunk_size if batch.inputs.batched else 1
    rows = (row for chunk in _chunks(batch, batch.run, size) for row in chunk)
    if nonfinite == "drop":
        rows = (row if row.isfinite().all() else row.detach() for row in rows)
    predictions, side = batch.unpacked(torch.stack(list(rows)))
    if nonfinite == "drop" or batch.bound.combination is None:
        wide = predictions.to(at_least_float32(predictions.dtype))
        return combine(batch.bound, wide, predictions, nonfinite, side=side)
    poses = predictions.unbind()
    prediction = full_graph(batch.model, poses, batch.bound.combination, batch.index, call=lambda _, row: row)
    return MultiPosePrediction(*prediction, combination=batch.bound, side=side)


def batched_step(batch: TrainingBatch) -> TrainingStep:
    """Return the step that runs all poses at once and keeps their graph."""
    return TrainingStep("full graph, batched", lambda: batch.combined([batch.run(0, len(batch.inputs))]), _no_report)


def checkpoint_step(batch: TrainingBatch, chunk_size: int = 1) -> TrainingStep:
    """Return the step that wraps each chunk in `torch.utils.checkpoint`."""
    name = "checkpoint per pose" if chunk_size == 1 else f"checkpoint per chunk of {chunk_size}"
    return TrainingStep(name, lambda: batch.combined(list(_chunks(batch, batch.checkpointed, chunk_size))), _no_report)


def offloaded_step(batch: TrainingBatch) -> TrainingStep:
    """Return the step that keeps the tensors of all graphs in the memory of the host."""
    on_device = next(batch.model.parameters()).device.type != "cpu"

    def forward() -> MultiPosePrediction:
        with save_on_cpu(pin_memory=on_device):
            return batch.combined(list(_chunks(batch, batch.run, len(batch.inputs) if batch.inputs.batched else 1)))

    return TrainingStep("full graph on the host", forward, _no_report)


def multipose_step(
    batch: TrainingBatch, *, accumulator: str | Accumulator = "auto", name: str | None = None, **options: Any
) -> TrainingStep:
    """Return the step of a `MultiPose`.

    Args:
        batch: The model and its poses.
        accumulator: A name or an object.
        name: Name in a table; that of the accumulator by default.
        **options: Further options of `MultiPose`.
    """
    options = {"call": batch.call, "collate": batch.collate, **options}
    scorer = MultiPose(batch.model, batch.combination, accumulator=accumulator, **options)
    return TrainingStep(
        name or str(scorer.accumulator), lambda: scorer(batch.poses, groups=batch.groups), lambda: scorer.report
    )


def _chunks(batch: TrainingBatch, run: Callable[[int, int], Tensor], size: int) -> Iterator[Tensor]:
    count = len(batch.inputs)
    return (run(start, min(count, start + size)) for start in range(0, count, size))


def sum_of_combined(prediction: MultiPosePrediction) -> Tensor:
    """Return the default loss: the sum of the combined prediction."""
    return prediction.combined.sum()


def _no_report() -> None:
    return None

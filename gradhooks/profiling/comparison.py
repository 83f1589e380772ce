"""Compare time, memory and gradients of one training step between the full graph and the accumulators."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from gradhooks.accumulators.base import Accumulator
from gradhooks.engine.model_state import ModelState
from gradhooks.options import OptionTypes
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.preserved_state import preserved_state
from gradhooks.profiling.result_table import ResultTable, TableContent
from gradhooks.profiling.timing import interleaved_seconds, median_ratio
from gradhooks.profiling.training_steps import CombinationLike, Loss, TrainingStep, sum_of_combined, training_steps
from gradhooks.units import format_bytes, format_seconds


@dataclass(frozen=True)
class ComparisonRow:
    """What one training step costs.

    Attributes:
        name: Full graph, checkpoint per pose, or the accumulator.
        seconds: Median time of a step.
        time_ratio: Median of the ratios to the full graph's step of the same round.
        peak_bytes: Peak of what a step allocates, gradients included; on a CPU counted to the byte.
        backwards: Poses that went through a backward, counted each time; None if every pose did so once.
        gradient_error: Largest relative difference of a parameter's gradient from the full graph's.
    """

    name: str
    seconds: float
    time_ratio: float
    peak_bytes: int
    backwards: int | None
    gradient_error: float


@dataclass(frozen=True)
class Comparison(ResultTable):
    """The result of `compare`; prints as a table.

    Attributes:
        rows: One per training step, the full graph first.
        poses: Poses in the group.
        setting: Versions and device.
    """

    rows: tuple[ComparisonRow, ...]
    poses: int
    setting: str

    def table_content(self) -> TableContent:
        """Return one row per training step; memory relative to the full graph's."""
        headers = ["step", "time ratio", "time", "memory ratio", "peak memory", "backwards", "gradient error"]
        rows = [
            [
                row.name,
                f"{row.time_ratio:.2f}",
                format_seconds(row.seconds),
                f"{row.peak_bytes / self.rows[0].peak_bytes:.3f}",
                format_bytes(row.peak_bytes),
                str(self.poses if row.backwards is None else row.backwards),
                f"{row.gradient_error:.1e}",
            ]
            for row in self.rows
        ]
        return TableContent(headers, rows, [f"{self.poses} poses; ratios to the full graph; {self.setting}"])

    def save(self, path: str | Path) -> None:
        """Write all fields as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw time and peak memory of each step relative to the full graph (needs matplotlib)."""
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional

        figure = Figure(figsize=(7, 0.5 * len(self.rows) + 1.5), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        names = [row.name for row in self.rows]
        axes[0].barh(names, [row.time_ratio for row in self.rows])
        axes[0].set_xlabel("time relative to the full graph")
        axes[1].barh(names, [row.peak_bytes / self.rows[0].peak_bytes for row in self.rows])
        axes[1].set_xlabel("peak memory relative to the full graph")
        axes[0].invert_yaxis()
        figure.savefig(path)


def compare(
    model: nn.Module,
    poses: Sequence[Any],
    combination: CombinationLike = "mean",
    *,
    accumulators: Sequence[str | Accumulator] = ("stream", "recompute", "auto"),
    loss: Loss = sum_of_combined,
    repeats: int = 5,
    **options: Unpack[OptionTypes],
) -> Comparison:
    """Run a training step with the full graph, with `torch.utils.checkpoint` per pose and with each accumulator.

    The steps are interleaved, so that background load affects all of them equally. The model, its `.grad`, buffers and
    random state are restored.

    Args:
        model: The bare model.
        poses: The group, a list of poses.
        combination: As for `MultiPose`.
        accumulators: Names or objects.
        loss: Of a prediction; the sum of the combined prediction by default.
        repeats: Timed rounds, after two that are not timed, in which `auto` settles.
        **options: Further options of `MultiPose`; an accumulator that ignores one of them runs without it.
    """
    steps = training_steps(model, poses, combination, accumulators, **options)
    return compare_steps(model, steps, len(poses), loss=loss, repeats=repeats)


def compare_steps(
    model: nn.Module,
    steps: Sequence[TrainingStep],
    poses: int,
    *,
    loss: Loss = sum_of_combined,
    repeats: int = 5,
) -> Comparison:
    """Run the given steps, the first of which is the reference.

    Args:
        model: The bare model.
        steps: Training steps of the same group and combination.
        poses: Poses in the group.
        loss: As for `compare`.
        repeats: As for `compare`.
    """
    device = next(model.parameters()).device
    with preserved_state(model):
        gradients = [_gradients(model, step, loss) for step in steps]
        runs = [partial(_run, model, step, loss) for step in steps]
        peaks = []
        for run in runs:
            model.zero_grad()
            peaks.append(peak_bytes(run, device))
        seconds = interleaved_seconds(runs, repeats, device)
        reports = [step.report() for step in steps]
    rows = [
        ComparisonRow(
            name=_row_name(step.name, "" if report is None else report.accumulator),
            seconds=statistics.median(seconds[index]),
            time_ratio=median_ratio(seconds[index], seconds[0]),
            peak_bytes=peaks[index],
            backwards=None if report is None else report.backwards,
            gradient_error=gradient_error(gradients[index], gradients[0]),
        )
        for index, (step, report) in enumerate(zip(steps, reports, strict=True))
    ]
    return Comparison(tuple(rows), poses, describe_setting(device))


def describe_setting(device: torch.device) -> str:
    """Return what figures depend on: version, device, threads."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, CPU, {torch.get_num_threads()} thread(s)"


def gradient_error(gradients: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the largest relative difference of a gradient; infinite if one of a pair is missing."""
    errors = [0.0]
    for actual, reference in zip(gradients, expected, strict=True):
        if (actual is None) != (reference is None):
            return float("inf")
        if actual is not None and reference is not None:
            scale = reference.to_dense().norm().item()
            errors.append((actual.to_dense() - reference.to_dense()).norm().item() / (scale or 1.0))
    return max(errors)


def _row_name(step: str, accumulator: str) -> str:
    """Return the name of a step, with the accumulator that ran if the name does not say so."""
    return step if accumulator in step else f"{step} ({accumulator})"


def _run(model: nn.Module, step: TrainingStep, loss: Loss) -> None:
    model.zero_grad()
    loss(step.forward()).backward()


def _gradients(model: nn.Module, step: TrainingStep, loss: Loss) -> list[Tensor | None]:
    with ModelState(model).preserved():  # all steps draw the same random numbers
        _run(model, step, loss)
    return [None if leaf.grad is None else leaf.grad.detach().clone() for leaf in model.parameters()]

"""Compare time, memory and gradients of one training step between full graphs, checkpoints and `MultiPose`."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from gradhooks import registry
from gradhooks.accumulators.base import Accumulator
from gradhooks.engine.model_state import ModelState
from gradhooks.engine.report import Report
from gradhooks.options import Options, OptionTypes
from gradhooks.profiling.gradient_observer import GradientObserver
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.preserved_state import preserved_state
from gradhooks.profiling.result_table import ResultTable, TableContent
from gradhooks.profiling.timing import interleaved_seconds, median_ratio
from gradhooks.profiling.training_batch import CombinationLike, TrainingBatch
from gradhooks.profiling.training_steps import Loss, TrainingStep, sum_of_combined, training_steps
from gradhooks.units import format_bytes, format_seconds


@dataclass(frozen=True)
class ComparisonRow:
    """What one training step costs.

    Attributes:
        name: Full graph, checkpoint, or the options of `MultiPose`.
        seconds: Median time of a step.
        time_ratio: Median of the ratios to the full graph's step of the same round.
        peak_bytes: Peak of what a step allocates, gradients included; on a CPU counted to the byte.
        plain: Poses that ran as in plain PyTorch; None if this step does not use `MultiPose`.
        backwards: Poses that went through a backward, counted each time; None if every pose did so once.
        gradient_error: Largest difference of a gradient from the full graph's, in the steps that were timed; see
            `gradient_errors`.
    """

    name: str
    seconds: float
    time_ratio: float
    peak_bytes: int
    plain: int | None
    backwards: int | None
    gradient_error: float


@dataclass(frozen=True)
class Comparison(ResultTable):
    """The result of `compare`; prints as a table.

    Attributes:
        rows: One per training step, the full graph first.
        poses: Poses in the batch.
        groups: Groups of the batch.
        setting: Versions and device.
    """

    rows: tuple[ComparisonRow, ...]
    poses: int
    groups: int
    setting: str

    def table_content(self) -> TableContent:
        """Return one row per training step; memory relative to the full graph's."""
        headers = ["step", "time ratio", "time", "memory ratio", "peak memory", "plain", "backwards", "gradient error"]
        rows = [
            [
                row.name,
                f"{row.time_ratio:.2f}",
                format_seconds(row.seconds),
                f"{row.peak_bytes / self.rows[0].peak_bytes:.3f}",
                format_bytes(row.peak_bytes),
                "" if row.plain is None else str(row.plain),
                str(self.poses if row.backwards is None else row.backwards),
                f"{row.gradient_error:.1e}",
            ]
            for row in self.rows
        ]
        size = f"{self.poses} poses" + (f" in {self.groups} groups" if self.groups > 1 else "")
        return TableContent(headers, rows, [f"{size}; ratios to the full graph; {self.setting}"])

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
    poses: Any,
    combination: CombinationLike = "mean",
    *,
    combination_options: Mapping[str, Any] | None = None,
    groups: Any = None,
    budgets: Sequence[str | float] = (),
    accumulators: Sequence[str | Accumulator] = (),
    loss: Loss = sum_of_combined,
    repeats: int = 5,
    **options: Unpack[OptionTypes],
) -> Comparison:
    """Run a training step in the ways that PyTorch offers, and with `MultiPose`.

    The rows are: the graph of all poses, run one by one, with which the others are compared; all poses in one forward,
    if they are stacked or can be collated; on a GPU, the same with what the graph keeps moved to the host;
    `torch.utils.checkpoint` for each pose and for each chunk; `MultiPose` with the given memory and with `memory=0`.

    The steps are interleaved, so that background load affects all of them equally. The model, its `.grad`, buffers and
    random state are restored.

    Args:
        model: The bare model.
        poses: A list of poses, a stacked tensor, a mapping of stacked tensors, or `Groups`.
        combination: As for `MultiPose`.
        combination_options: As for `MultiPose`.
        groups: The group of each pose, shape `(M,)`; by default the poses are one group.
        budgets: Further values of the option `memory`, a row for each.
        accumulators: Names or objects, a row for each, in which no pose runs plainly.
        loss: Of a prediction; the sum of the combined prediction by default.
        repeats: Timed rounds, after two that are not timed, in which `auto` settles.
        **options: Further options of `MultiPose`; an accumulator that ignores one of them runs without it.
    """
    chosen = registry.resolve_combination(combination, combination_options)
    batch = TrainingBatch(model, poses, chosen, groups, options.get("call"), options.get("collate"))
    every = dict.fromkeys([options.get("memory", Options.memory), *budgets, 0])
    steps = training_steps(batch, list(every), accumulators, **options)
    return compare_steps(batch, steps, loss=loss, repeats=repeats)


def compare_steps(
    batch: TrainingBatch, steps: Sequence[TrainingStep], *, loss: Loss = sum_of_combined, repeats: int = 5
) -> Comparison:
    """Run the given steps, the first of which is the reference.

    Args:
        batch: The model and its poses.
        steps: Training steps of this batch.
        loss: As for `compare`.
        repeats: As for `compare`.
    """
    model = batch.model
    device = next(model.parameters()).device
    observer = GradientObserver(model, len(steps))
    with preserved_state(model):
        runs = [partial(_run, model, step, loss) for step in steps]
        peaks = []
        for run in runs:
            with ModelState(model).preserved():
                run()
                model.zero_grad()
                peaks.append(peak_bytes(run, device))
        seconds = interleaved_seconds(runs, repeats, device, observer.around)
    rows = [
        _row(step, seconds[index], seconds[0], peaks[index], observer.errors[index]) for index, step in enumerate(steps)
    ]
    groups = 1 if batch.bound.groups is None else batch.bound.groups.count
    return Comparison(tuple(rows), len(batch.inputs), groups, describe_setting(device))


def _row(
    step: TrainingStep, seconds: Sequence[float], reference: Sequence[float], peak: int, error: float
) -> ComparisonRow:
    report = step.report()
    return ComparisonRow(
        name=_row_name(step.name, report),
        seconds=statistics.median(seconds),
        time_ratio=median_ratio(seconds, reference),
        peak_bytes=peak,
        plain=None if report is None else report.plain,
        backwards=None if report is None else report.backwards,
        gradient_error=error,
    )


def describe_setting(device: torch.device) -> str:
    """Return what figures depend on: version, device, threads."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, CPU, {torch.get_num_threads()} thread(s)"


def _row_name(step: str, report: Report | None) -> str:
    """Return the name of a step, with the accumulator that ran if the name does not say so."""
    if report is None or report.accumulator in {step, "none"}:
        return step
    return f"{step} ({report.accumulator})"


def _run(model: nn.Module, step: TrainingStep, loss: Loss) -> None:
    model.zero_grad()
    loss(step.forward()).backward()

"""compare: one training step by every way, measured side by side in one process."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.accumulators.base import Accumulator
from gradhooks.engine.model_state import ModelState
from gradhooks.profiling.table import table
from gradhooks.profiling.timing import Step, in_turns, peak_of, ratio
from gradhooks.profiling.training_steps import Loss, Way, all_ways, total
from gradhooks.profiling.undisturbed import undisturbed


@dataclass(frozen=True)
class Row:
    """What one way costs.

    Attributes:
        way: Its name.
        seconds: Median time of a step.
        time_ratio: Median of the ratios to the full graph's step of the same round.
        peak_bytes: Peak of what a step allocates, gradients included; on a CPU counted to the byte.
        backwards: Backwards through the model; None where it is one for each pose.
        error: Largest relative difference of a parameter's gradient from the full graph's.
    """

    way: str
    seconds: float
    time_ratio: float
    peak_bytes: int
    backwards: int | None
    error: float


@dataclass(frozen=True)
class Comparison:
    """Rows, the full graph first; prints as a table.

    Attributes:
        rows: One for each way.
        poses: Poses in the group.
        setting: Versions and device.
    """

    rows: tuple[Row, ...]
    poses: int
    setting: str

    def __str__(self) -> str:
        lines = [
            [
                row.way,
                f"{row.time_ratio:.2f}",
                f"{row.seconds * 1e3:.0f} ms",
                f"{row.peak_bytes / 2**20:.2f} MiB",
                f"{row.peak_bytes / self.rows[0].peak_bytes:.3f}",
                str(self.poses if row.backwards is None else row.backwards),
                f"{row.error:.1e}",
            ]
            for row in self.rows
        ]
        heads = [f"{self.poses} poses", "time", "a step", "peak", "of full", "backwards", "gradient error"]
        return table(heads, lines)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw time and peak of each way beside the full graph's (needs matplotlib)."""
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional

        figure = Figure(figsize=(7, 0.5 * len(self.rows) + 1.5), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        names = [row.way for row in self.rows]
        axes[0].barh(names, [row.time_ratio for row in self.rows])
        axes[0].set_xlabel("time, of the full graph's")
        axes[1].barh(names, [row.peak_bytes / self.rows[0].peak_bytes for row in self.rows])
        axes[1].set_xlabel("peak memory, of the full graph's")
        axes[0].invert_yaxis()
        figure.savefig(path)


def compare(
    model: nn.Module,
    poses: Sequence[Any],
    combination: str | Callable[[Tensor], Tensor] = "mean",
    *,
    accumulators: Sequence[str | Accumulator] = ("stream", "recompute", "auto"),
    loss: Loss = total,
    repeats: int = 5,
    **options: Any,
) -> Comparison:
    """Run a training step by the full graph, by `torch.utils.checkpoint` per pose and by each accumulator.

    The ways take turns, so that whatever else the machine does falls on all of them. The model, its `.grad`, buffers
    and random state are afterwards what they were.

    Args:
        model: The bare model.
        poses: The group, a list of poses.
        combination: As for `MultiPose`.
        accumulators: Names or objects.
        loss: Of a prediction; the sum of the combined one by default.
        repeats: Rounds that count, after two that do not: `auto` has settled by then.
        **options: Further options of `MultiPose`.
    """
    ways = all_ways(model, poses, combination, accumulators, **options)
    device = next(model.parameters()).device
    with undisturbed(model):
        gradients = [_gradients(model, way, loss) for way in ways]
        steps = [partial(_step, model, way, loss) for way in ways]
        peaks = [_peak(model, step, device) for step in steps]
        seconds = in_turns(steps, repeats, device)
        reports = [way.report() for way in ways]
    rows = [
        Row(
            way=f"{way.name} ({report.accumulator})" if report and report.accumulator not in way.name else way.name,
            seconds=statistics.median(seconds[place]),
            time_ratio=ratio(seconds[place], seconds[0]),
            peak_bytes=peaks[place],
            backwards=None if report is None else report.backwards,
            error=gradient_error(gradients[place], gradients[0]),
        )
        for place, (way, report) in enumerate(zip(ways, reports, strict=True))
    ]
    return Comparison(tuple(rows), len(poses), setting(device))


def setting(device: torch.device) -> str:
    """Where figures come from: versions, device, threads."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, CPU, {torch.get_num_threads()} thread(s)"


def _step(model: nn.Module, way: Way, loss: Loss) -> None:
    model.zero_grad()
    loss(way.forward()).backward()


def _gradients(model: nn.Module, way: Way, loss: Loss) -> list[Tensor | None]:
    with ModelState(model).preserved():  # all ways draw the same random numbers
        _step(model, way, loss)
    return [None if leaf.grad is None else leaf.grad.detach().clone() for leaf in model.parameters()]


def _peak(model: nn.Module, step: Step, device: torch.device) -> int:
    model.zero_grad()
    return peak_of(step, device)


def gradient_error(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """The largest relative difference of a gradient; infinite where one is missing."""
    errors = [0.0]
    for one, other in zip(found, wanted, strict=True):
        if (one is None) != (other is None):
            return float("inf")
        if one is not None and other is not None:
            scale = other.to_dense().norm().item()
            errors.append((one.to_dense() - other.to_dense()).norm().item() / (scale or 1.0))
    return max(errors)

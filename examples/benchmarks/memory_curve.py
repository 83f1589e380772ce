"""Measure time and peak memory of a step against the option `memory`, and its peak at `memory=0` by size of batch."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from command_line import flushed_denormals, markdown_table, parser, save
from small_models import COMBINATIONS, SMALL_MODELS, batch_of

from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.timing import interleaved_seconds, median_ratio
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.profiling.training_steps import TrainingStep, batched_step, multipose_step
from gradhooks.units import format_bytes

WARM_UP_STEPS = 3
SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 2.0)
"""The budgets, relative to the peak of the batched full graph."""


class CurvePoint(NamedTuple):
    """A step of one batch with one budget.

    Attributes:
        combination: The combination.
        memory: The budget in bytes.
        plain: Poses that ran plainly.
        recomputed: Poses that ran twice.
        time_ratio: Median ratio of the times to the batched full graph's of the same round.
        peak: Peak of the step in bytes.
        bound: The budget and the peak of the largest step of one pose, gradients included.
    """

    combination: str
    memory: int
    plain: int
    recomputed: int
    time_ratio: float
    peak: int
    bound: int


class LeastPeak(NamedTuple):
    """The peak of a step at `memory=0`, relative to that of one pose's step.

    Attributes:
        combination: The combination.
        group_size: Poses of a group.
        groups: Groups of the batch.
        peak: Peak of the step in bytes.
        copies: By how many copies of the gradients it exceeds the step of one pose.
    """

    combination: str
    group_size: int
    groups: int
    peak: int
    copies: float


def curve(name: str, group_size: int, groups: int, repeats: int, device: torch.device) -> Iterator[CurvePoint]:
    """Measure a batch of groups with several budgets."""
    for combination in COMBINATIONS:
        batch = batch_of(name, combination, group_size, groups, device)
        with flushed_denormals():
            full = batched_step(batch)
            whole = _peak(batch, full)
            budgets = [int(share * whole) for share in SHARES]
            steps = [full, *(multipose_step(batch, memory=budget) for budget in budgets)]
            runs = [partial(_run, batch, step) for step in steps]
            for _ in range(WARM_UP_STEPS):
                for run in runs:
                    run()
            peaks = [_peak(batch, step) for step in steps]
            seconds = interleaved_seconds(runs, repeats, device)
        pose = largest_pose_peak(batch)
        for index, (budget, step) in enumerate(zip(budgets, steps[1:], strict=True), start=1):
            report, ratio = step.report(), median_ratio(seconds[index], seconds[0])
            if report is not None:
                plain, again = report.plain, report.recomputed
                yield CurvePoint(combination, budget, plain, again, ratio, peaks[index], budget + pose)


def least_peaks(name: str, sizes: Sequence[tuple[int, int]], device: torch.device) -> Iterator[LeastPeak]:
    """Measure the peak at `memory=0` for batches of several sizes `(N, B)`."""
    for combination in COMBINATIONS:
        for group_size, groups in sizes:
            batch = batch_of(name, combination, group_size, groups, device)
            step = multipose_step(batch, memory=0)
            for _ in range(WARM_UP_STEPS):
                _run(batch, step)
            peak = _peak(batch, step)
            copies = (peak - largest_pose_peak(batch)) / gradient_bytes(batch)
            yield LeastPeak(combination, group_size, groups, peak, copies)


def largest_pose_peak(batch: TrainingBatch) -> int:
    """Return the largest peak of a plain step of one pose, gradients included."""

    def step(index: int) -> None:
        batch.run(index, index + 1).sum().backward()

    peaks = []
    for index in range(len(batch.inputs)):
        batch.model.zero_grad()
        peaks.append(peak_bytes(partial(step, index), device_of(batch)))
    return max(peaks)


def gradient_bytes(batch: TrainingBatch) -> int:
    """Return one copy of the gradients."""
    return sum(parameter.nbytes for parameter in batch.model.parameters())


def device_of(batch: TrainingBatch) -> torch.device:
    """Return the device of the model."""
    return next(batch.model.parameters()).device


def _run(batch: TrainingBatch, step: TrainingStep) -> None:
    batch.model.zero_grad()
    step.forward().combined.sum().backward()


def _peak(batch: TrainingBatch, step: TrainingStep) -> int:
    batch.model.zero_grad()
    return peak_bytes(partial(_run, batch, step), device_of(batch))


def curve_table(points: Sequence[CurvePoint]) -> str:
    """Return a row for each budget; peaks above the bound are bold."""
    rows = [
        [
            f"{point.combination}: {format_bytes(point.memory)}",
            str(point.plain),
            str(point.recomputed),
            f"{point.time_ratio:.2f}",
            format_bytes(point.peak) if point.peak <= point.bound else f"**{format_bytes(point.peak)}**",
            format_bytes(point.bound),
        ]
        for point in points
    ]
    headers = ["memory", "plain", "run twice", "time / batched full graph", "peak", "memory + step of a pose"]
    return markdown_table(headers, rows)


def least_table(peaks: Sequence[LeastPeak]) -> str:
    """Return a row for each batch at `memory=0`."""
    rows = [
        [peak.combination, str(peak.group_size), str(peak.groups), format_bytes(peak.peak), f"{peak.copies:.2f}"]
        for peak in peaks
    ]
    return markdown_table(["memory=0", "N", "B", "peak", "beyond the step of a pose, gradients"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parser(__doc__, repeats=5)
    options.add_argument("--model", default="schnet", choices=list(SMALL_MODELS))
    options.add_argument("--group-size", type=int, default=16, help="N of the curve (default: %(default)s)")
    options.add_argument("--groups", type=int, default=8, help="B of the curve (default: %(default)s)")
    options.add_argument("--many", type=int, default=64, help="the largest N and B at memory=0 (default: %(default)s)")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    points = list(curve(chosen.model, chosen.group_size, chosen.groups, chosen.repeats, device))
    print(curve_table(points), "\n", flush=True)
    peaks = list(least_peaks("mlp", [(4, 2), (4, 8), (4, chosen.many), (4, 1), (chosen.many, 1)], device))
    print(least_table(peaks))
    save([point._asdict() for point in points] + [peak._asdict() for peak in peaks], chosen.save)


if __name__ == "__main__":
    main()

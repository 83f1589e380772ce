"""Measure what Python costs beyond plain steps for a batch, a pose, a parameter; and how bytes and time grow.

Costs are processor time of one thread, which other processes disturb less than they do the clock, and the least of many
rounds: what the code itself takes. Steps are short, so that some of them are not interrupted at all.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from command_line import flushed_denormals, markdown_table, parser, save
from torch import Tensor, nn

from gradhooks import MultiPose
from gradhooks.combinations import Boltzmann, Mean, Min
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.timing import interleaved_seconds

CPU = torch.device("cpu")
WARM_UP_STEPS = 3
MICRO = 1e6
WAYS = {
    "mean, stream": (Mean(), "stream"),
    "mean, recompute": (Mean(), "recompute"),
    "min, stream": (Min(1.0), "stream"),
    "min, recompute": (Min(1.0), "recompute"),
    "boltzmann, stream": (Boltzmann(1.0), "stream"),
    "boltzmann, recompute": (Boltzmann(1.0), "recompute"),
}
GROWTH = ("store", "stream", "recompute", "auto")


class Tiny(nn.Module):
    """A model with `count` parameters of one number each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(1)) for _ in range(count))

    def forward(self, poses: Tensor) -> Tensor:
        return (poses * torch.cat(list(self.weights))).tanh().sum(-1, keepdim=True)


class Overhead(NamedTuple):
    """Seconds beyond plain steps of the same poses: those that run twice are compared with a forward and a step.

    Attributes:
        way: The combination and the accumulator of poses in chunks of one; or that all poses are plain, in one chunk.
        per_batch: For a batch, whatever its size.
        per_pose: For each pose.
        per_parameter: For each parameter and batch.
        per_pose_and_parameter: For each parameter and pose.
    """

    way: str
    per_batch: float
    per_pose: float
    per_parameter: float
    per_pose_and_parameter: float


def overheads(poses: tuple[int, int], parameters: tuple[int, int], repeats: int) -> Iterator[Overhead]:
    """Fit the costs to two numbers of poses and two of parameters, in chunks of one pose, and where all are plain."""
    for way, (combination, accumulator) in WAYS.items():
        extra = {}
        for count in parameters:
            model = Tiny(count)
            for number in poses:
                scorer = MultiPose(model, combination, accumulator=accumulator, memory=0, tolerance=0)  # skips no pose
                extra[number, count] = _extra(scorer, torch.randn(number, count), repeats, _one_by_one)
        yield Overhead(way, *_fit(extra))
    extra = {}
    for count in parameters:
        model = Tiny(count)
        for number in poses:
            extra[number, count] = _extra(MultiPose(model), torch.randn(number, count), repeats, _at_once)
    yield Overhead("all poses plain", *_fit(extra))


Plain = Callable[[MultiPose[Any], Tensor], None]


def _extra(scorer: MultiPose[Any], poses: Tensor, repeats: int, plain: Plain) -> float:
    """Return the seconds that a step of `scorer` takes beyond `plain`: the fastest of each, which is without noise."""

    def step() -> None:
        scorer.model.zero_grad()
        scorer(poses).combined.sum().backward()

    with flushed_denormals():
        for _ in range(WARM_UP_STEPS):
            step()
        ours, plainly = _least_seconds([step, partial(plain, scorer, poses)], repeats)
    return ours - plainly


def _least_seconds(steps: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the least processor time of each step; the steps take turns, and no garbage is collected meanwhile."""
    least = [float("inf")] * len(steps)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for number, step in enumerate(steps):
                start = time.thread_time()
                step()
                least[number] = min(least[number], time.thread_time() - start)
    finally:
        gc.enable()
    return least


def _one_by_one(scorer: MultiPose[Any], poses: Tensor) -> None:
    scorer.model.zero_grad()
    if scorer.report.recomputed:
        with torch.no_grad():
            for index in range(len(poses)):
                scorer.model(poses[index : index + 1])
    for index in range(len(poses)):
        scorer.model(poses[index : index + 1]).sum().backward()


def _at_once(scorer: MultiPose[Any], poses: Tensor) -> None:
    scorer.model.zero_grad()
    scorer.combination(scorer.model(poses)).sum().backward()


def _fit(extra: dict[tuple[int, int], float]) -> tuple[float, float, float, float]:
    """Solve `a + b M + c P + d M P = extra[M, P]` for four measurements."""
    keys = list(extra)
    matrix = torch.tensor([[1, number, count, number * count] for number, count in keys], dtype=torch.float64)
    times = torch.tensor([extra[key] for key in keys], dtype=torch.float64)
    a, b, c, d = torch.linalg.solve(matrix, times).tolist()
    return a, b, c, d


class Growth(NamedTuple):
    """A step of a group on a tiny model.

    Attributes:
        accumulator: The accumulator.
        poses: Poses of the group.
        seconds_per_pose: Time of a step.
        bytes_per_pose: What the peak grows by, from the group of half the size.
    """

    accumulator: str
    poses: int
    seconds_per_pose: float
    bytes_per_pose: float


def growth(sizes: Sequence[int], repeats: int) -> Iterator[Growth]:
    """Measure groups of several sizes with each accumulator, in chunks of one pose."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    for accumulator in GROWTH:
        for count in sizes:
            scorer = MultiPose(model, Boltzmann(1.0), accumulator=accumulator, memory=0)
            poses = torch.randn(count, 8)
            runs = [partial(_step, scorer, part) for part in (poses[: count // 2], poses)]
            for run in runs:
                run()
            half, whole = (peak_bytes(run, CPU) for run in runs)
            seconds = min(interleaved_seconds([runs[1]], repeats, CPU)[0])
            yield Growth(accumulator, count, seconds / count, (whole - half) / (count - count // 2))


def _step(scorer: MultiPose[Any], poses: Tensor) -> None:
    scorer.model.zero_grad()
    scorer(poses).combined.sum().backward()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parser(__doc__, repeats=15)
    options.add_argument("--poses", nargs=2, type=int, default=[4, 64], help="default: %(default)s")
    options.add_argument("--parameters", nargs=2, type=int, default=[20, 400], help="default: %(default)s")
    sizes = [32, 512, 4096, 16384]
    options.add_argument("--sizes", nargs="+", type=int, default=sizes, help="poses of a group (default: %(default)s)")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    costs = list(overheads(tuple(chosen.poses), tuple(chosen.parameters), chosen.repeats))
    headers = ["microseconds beyond plain steps", "batch", "pose", "parameter", "pose and parameter"]
    print(
        markdown_table(headers, [[cost.way, *(f"{MICRO * value:.2f}" for value in cost[1:])] for cost in costs]), "\n"
    )
    grown = list(growth(chosen.sizes, min(3, chosen.repeats)))
    rows = [
        [each.accumulator, str(each.poses), f"{MICRO * each.seconds_per_pose:.0f} us", f"{each.bytes_per_pose:.0f} B"]
        for each in grown
    ]
    print(markdown_table(["accumulator", "poses", "time per pose", "memory per pose"], rows))
    save([cost._asdict() for cost in costs] + [each._asdict() for each in grown], chosen.save)


if __name__ == "__main__":
    main()

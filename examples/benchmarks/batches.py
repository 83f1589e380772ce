"""Compare batches of groups with the same poses in one batched forward, for models with small poses."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from command_line import flushed_denormals, markdown_table, parser, save
from small_models import COMBINATIONS, SMALL_MODELS, batch_of

from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.timing import interleaved_seconds, median_ratio
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.profiling.training_steps import TrainingStep, batched_step, checkpoint_step, multipose_step
from gradhooks.units import format_seconds

WARM_UP_STEPS = 3  # in which sizes are measured and `auto` settles
LIMITS = {"default": 1.10, "memory=0": 1.40, "checkpoint": float("inf"), "a tenth": 1.0}
CHUNK_SIZE = 16
MLP_LIMIT = 1.5  # or ALLOWED_SECONDS more
ALLOWED_SECONDS = 1e-3


class BatchTime(NamedTuple):
    """The time of a step relative to the batched full graph.

    Attributes:
        model: The model.
        combination: The combination.
        group_size: Poses of a group.
        groups: Groups of the batch.
        way: `"default"` memory; `"memory=0"` in chunks of 16, and a `"checkpoint"` for each of these chunks, for
            comparison; `"a tenth"` of the memory of the full graph.
        batched_seconds: Median time of the batched full graph.
        ratio: Median of the ratios of the same round.
    """

    model: str
    combination: str
    group_size: int
    groups: int
    way: str
    batched_seconds: float
    ratio: float

    @property
    def met(self) -> bool:
        """Whether the ratio is within its limit."""
        if self.model == "mlp" and self.way == "default":
            return self.ratio <= MLP_LIMIT or (self.ratio - 1) * self.batched_seconds <= ALLOWED_SECONDS
        return self.ratio <= LIMITS[self.way]


def measure(
    models: Sequence[str], sizes: Sequence[int], groups: Sequence[int], repeats: int, device: torch.device
) -> Iterator[BatchTime]:
    """Measure every model with every combination and every size of a batch."""
    for name, combination, size, count in product(models, COMBINATIONS, sizes, groups):
        batch = batch_of(name, combination, size, count, device)
        with flushed_denormals():
            steps = steps_of(batch, sharp="1000" in combination)
            runs = [partial(_run, batch, step) for step in steps.values()]
            for _ in range(WARM_UP_STEPS):
                for run in runs:
                    run()
            seconds = interleaved_seconds(runs, repeats, device)
        batched, *others = seconds
        median = sorted(batched)[len(batched) // 2]
        for way, times in zip(list(steps)[1:], others, strict=True):
            yield BatchTime(name, combination, size, count, way, median, median_ratio(times, batched))


def steps_of(batch: TrainingBatch, *, sharp: bool) -> dict[str, TrainingStep]:
    """Return the batched full graph and the steps that are compared with it."""
    full = batched_step(batch)
    steps = {
        "batched": full,
        "default": multipose_step(batch),
        "memory=0": multipose_step(batch, memory=0, chunk_size=CHUNK_SIZE),
        "checkpoint": checkpoint_step(batch, CHUNK_SIZE),
    }
    if sharp:
        memory = peak_bytes(partial(_run, batch, full), next(batch.model.parameters()).device) // 10
        steps["a tenth"] = multipose_step(batch, memory=memory)
    return steps


def _run(batch: TrainingBatch, step: TrainingStep) -> None:
    batch.model.zero_grad()
    step.forward().combined.sum().backward()


def table(times: Sequence[BatchTime]) -> str:
    """Return a table with a row for each batch; ratios above their limit are bold."""
    rows: dict[tuple[str, str, int, int], dict[str, str]] = {}
    for time in times:
        cells = rows.setdefault(time[:4], {"batched": format_seconds(time.batched_seconds)})
        cells[time.way] = f"{time.ratio:.2f}" if time.met else f"**{time.ratio:.2f}**"
    columns = ["batched", *LIMITS]
    lines = [
        [f"{key[0]}: {key[1]}", *map(str, key[2:]), *(cells.get(c, "") for c in columns)] for key, cells in rows.items()
    ]
    headers = [
        "time / batched full graph",
        "N",
        "B",
        "batched",
        "default",
        "memory=0, chunks of 16",
        "checkpoint",
        "a tenth",
    ]
    return markdown_table(headers, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parser(__doc__, repeats=5)
    options.add_argument("--models", nargs="+", default=list(SMALL_MODELS), choices=list(SMALL_MODELS))
    options.add_argument("--sizes", nargs="+", type=int, default=[4, 16, 64], help="N (default: %(default)s)")
    options.add_argument("--groups", nargs="+", type=int, default=[1, 8, 32], help="B (default: %(default)s)")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    times = list(measure(chosen.models, chosen.sizes, chosen.groups, chosen.repeats, torch.device(chosen.device)))
    print(table(times))
    save([{**time._asdict(), "met": time.met} for time in times], chosen.save)


if __name__ == "__main__":
    main()

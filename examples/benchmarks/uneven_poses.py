"""Measure a group on several processes in which few poses matter: on all of them, or on one only (`process_group=`)."""

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from command_line import markdown_table, parser, save
from torch import Tensor, multiprocessing, nn

import gradhooks
from gradhooks.profiling.timing import interleaved_seconds
from gradhooks.units import format_seconds

WIDTH = 1024
TIMEOUT = timedelta(minutes=5)


class Settings(NamedTuple):
    """What each process needs to know."""

    ranks: int
    poses: int  # of a rank
    significant: int
    repeats: int
    folder: str


@dataclass(frozen=True)
class Spread:
    """A step in which some poses matter.

    Attributes:
        where: Where these poses are.
        seconds: The time of a step.
        backwards: The poses with a backward, by rank.
    """

    where: str
    seconds: float
    backwards: list[int]


def weighted_mean(predictions: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean; a pose with a negligible weight gets no backward."""
    return torch.tensordot(weights.to(predictions), predictions, dims=1) / weights.sum()


def weights_by_place(ranks: int, poses: int, significant: int) -> dict[str, Tensor]:
    """Return the weights of all poses, `poses` on each rank, by where the `significant` ones are."""
    spread, concentrated = (torch.full((ranks, poses), 1e-30, dtype=torch.float64) for _ in range(2))
    spread[:, : significant // ranks] = 1.0
    concentrated[0, :significant] = 1.0
    places = {
        "all poses matter": torch.ones(ranks, poses),
        f"{significant} matter, spread over ranks": spread,
        f"{significant} matter, all on rank 0": concentrated,
    }
    return {where: weights.flatten() for where, weights in places.items()}


def measure(ranks: int, poses: int, significant: int, repeats: int) -> list[Spread]:
    """Measure with `ranks` processes, which have `poses` poses each."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(ranks, poses, significant, repeats, folder)
        multiprocessing.spawn(_run_rank, (settings,), nprocs=ranks)
        by_rank = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    places = weights_by_place(ranks, poses, significant)
    return [
        Spread(where, max(each[where][0] for each in by_rank), [each[where][1] for each in by_rank]) for where in places
    ]


def _run_rank(rank: int, settings: Settings) -> None:
    ranks, poses, significant, repeats, folder = settings
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    options: dict[str, Any] = {"accumulator": "recompute", "process_group": dist.group.WORLD}
    scorer = gradhooks.MultiPose(model, weighted_mean, **options)
    own = torch.randn(poses, WIDTH).unbind()
    backwards = []

    def step(weights: Tensor) -> None:
        dist.barrier()
        model.zero_grad()
        scorer(own, weights=weights).combined.square().sum().backward()
        backwards.append(scorer.report.backwards)

    places = weights_by_place(ranks, poses, significant)
    steps = [lambda weights=weights: step(weights) for weights in places.values()]
    interleaved_seconds(steps, 1, torch.device("cpu"))
    seconds = interleaved_seconds(steps, repeats, torch.device("cpu"))
    found = {
        where: (statistics.median(times), count)
        for where, times, count in zip(places, seconds, backwards, strict=False)
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def spread_table(spreads: Sequence[Spread]) -> str:
    """Return a Markdown table."""
    rows = [[each.where, ", ".join(map(str, each.backwards)), format_seconds(each.seconds)] for each in spreads]
    return markdown_table(["poses", "backwards on each rank", "step"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parser(__doc__, repeats=5)
    options.add_argument("--ranks", type=int, default=4, help="number of processes (default: 4)")
    options.add_argument("--poses", type=int, default=32, help="poses of a rank (default: 32)")
    options.add_argument("--significant", type=int, default=16, help="poses that matter (default: 16)")
    parsed = options.parse_args(arguments)
    spreads = measure(parsed.ranks, parsed.poses, parsed.significant, parsed.repeats)
    print(spread_table(spreads))
    save([asdict(each) for each in spreads], parsed.save)


if __name__ == "__main__":
    main()

"""Measure what it costs to share one group among processes (`process_group=`)."""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from command_line import markdown_table, parser, save
from torch import multiprocessing, nn

import gradhooks
from gradhooks.profiling.timing import interleaved_seconds
from gradhooks.units import format_bytes, format_seconds

WIDTHS = (128, 1024)  # of square layers
LAYERS = 3
WARM_UP_ROUNDS = 2
TIMEOUT = timedelta(minutes=5)


class Settings(NamedTuple):
    """What each process needs to know."""

    ranks: int
    poses: tuple[int, ...]  # of a rank
    repeats: int
    device: str
    threads: int
    folder: str


@dataclass(frozen=True)
class SharingCost:
    """One step of a group shared by all ranks, compared with a step of a separate group on each rank.

    Attributes:
        ranks: Number of processes.
        poses: Poses of the shared group.
        parameters: Numbers in a gradient.
        separate_seconds: A step of a separate group on each rank, all at the same time.
        added_seconds: Additional time of the shared group.
        sent_bytes: Bytes of the predictions and of the gradient.
    """

    ranks: int
    poses: int
    parameters: int
    separate_seconds: float
    added_seconds: float
    sent_bytes: int

    @property
    def total_seconds(self) -> float:
        """Time of a step of the shared group."""
        return self.separate_seconds + self.added_seconds


def measure_sharing(
    ranks: Sequence[int], poses: Sequence[int], repeats: int, device: str, threads: int
) -> Iterator[SharingCost]:
    """Measure groups and models of several sizes with several numbers of processes.

    Both steps run on all ranks at the same time and are interleaved, so that competition for one machine affects both
    equally. The figures are those of the slowest rank.

    Args:
        ranks: Numbers of processes.
        poses: Poses of a rank.
        repeats: Timed rounds.
        device: `"cpu"` (gloo) or `"cuda"` (NCCL, one GPU per rank).
        threads: CPU threads of a process.
    """
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(count, tuple(poses), repeats, device, threads, folder)
            multiprocessing.spawn(_run_rank, (settings,), nprocs=count)
            by_rank = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
        for costs in zip(*by_rank, strict=True):
            yield max((SharingCost(**cost) for cost in costs), key=lambda cost: cost.total_seconds)


def _run_rank(rank: int, settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{settings.folder}/store", settings.ranks)
    backend = "nccl" if settings.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=settings.ranks, timeout=TIMEOUT)
    try:
        costs = [asdict(_measure(poses, width, settings)) for poses, width in product(settings.poses, WIDTHS)]
        (Path(settings.folder) / f"{rank}.json").write_text(json.dumps(costs))
    finally:
        dist.destroy_process_group()


def _measure(poses: int, width: int, settings: Settings) -> SharingCost:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 1)).to(settings.device)
    own_poses = torch.randn(poses, width, device=settings.device).unbind()
    separate, shared = (
        gradhooks.MultiPose(model, "boltzmann", accumulator="stream", process_group=group)
        for group in (None, dist.group.WORLD)
    )

    def step(scorer: gradhooks.MultiPose) -> None:
        dist.barrier()
        model.zero_grad()
        scorer(own_poses).combined.square().sum().backward()

    steps, device = (partial(step, separate), partial(step, shared)), torch.device(settings.device)
    interleaved_seconds(steps, WARM_UP_ROUNDS, device)
    separate_seconds, shared_seconds = interleaved_seconds(steps, settings.repeats, device)
    added = [both - alone for both, alone in zip(shared_seconds, separate_seconds, strict=True)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    total = settings.ranks * poses
    return SharingCost(
        ranks=settings.ranks,
        poses=total,
        parameters=parameters,
        separate_seconds=statistics.median(separate_seconds),
        added_seconds=statistics.median(added),
        sent_bytes=4 * (total + parameters),
    )


def sharing_table(costs: Sequence[SharingCost]) -> str:
    """Return a Markdown table."""
    headers = ["ranks", "poses", "parameters", "separate groups", "sharing adds", "sent"]
    rows = [
        [
            str(cost.ranks),
            str(cost.poses),
            f"{cost.parameters / 1e6:.2f} M",
            format_seconds(cost.separate_seconds),
            format_seconds(cost.added_seconds),
            format_bytes(cost.sent_bytes),
        ]
        for cost in costs
    ]
    return markdown_table(headers, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parser(__doc__, repeats=5)
    options.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes (default: 1 2 4)"
    )
    options.add_argument("--poses", type=int, nargs="+", default=[8, 64], help="poses of a rank (default: 8 64)")
    parsed = options.parse_args(arguments)
    costs = list(measure_sharing(parsed.ranks, parsed.poses, parsed.repeats, parsed.device, parsed.threads))
    print(sharing_table(costs))
    save([asdict(cost) for cost in costs], parsed.save)


if __name__ == "__main__":
    main()

"""bench --ranks: what it costs to share one group over processes."""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from gradhooks.profiling.table import table
from gradhooks.profiling.timing import in_turns
from gradhooks.wrapper import MultiPose

POSES = (8, 64)  # of a rank
WIDTHS = (128, 1024)  # of square layers
LAYERS = 3
LIMIT = timedelta(minutes=5)


@dataclass(frozen=True)
class Shared:
    """One step of a group that ranks share, beside the same ranks each with a group of its own.

    Attributes:
        ranks: How many processes.
        poses: N, over all of them.
        parameters: Numbers in a gradient.
        alone: Seconds of a step on a rank's own poses, while the others do the same.
        added: Seconds more where all those poses are one group.
        travels: Bytes of the predictions and of the gradient.
    """

    ranks: int
    poses: int
    parameters: int
    alone: float
    added: float
    travels: int


def sharing(ranks: Sequence[int], repeats: int, device: str = "cpu") -> Iterator[Shared]:
    """Measure for groups of several sizes, models of several sizes and numbers of processes.

    Both steps run on all ranks at once and take turns, so that what processes take from each other on one machine falls
    on both. Medians are those of the slowest rank.
    """
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_run, (count, repeats, device, folder), nprocs=count)  # type: ignore[attr-defined]
            found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
        for each in zip(*found, strict=True):
            yield Shared(**max(each, key=lambda shared: shared["alone"] + shared["added"]))


def _run(rank: int, ranks: int, repeats: int, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/meeting", ranks)  # type: ignore[attr-defined]
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=LIMIT)
    try:
        found = [asdict(_measured(poses, width, repeats, device)) for poses, width in product(POSES, WIDTHS)]
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def _measured(poses: int, width: int, repeats: int, device: str) -> Shared:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 1)).to(device)
    own = torch.randn(poses, width, device=device).unbind()
    alone, shared = (
        MultiPose(model, "boltzmann", accumulator="stream", process_group=group) for group in (None, dist.group.WORLD)
    )

    def step(scorer: MultiPose) -> None:
        dist.barrier()
        model.zero_grad()
        scorer(own).combined.square().sum().backward()

    steps = (partial(step, alone), partial(step, shared))
    in_turns(steps, 2, torch.device(device))
    singly, jointly = in_turns(steps, repeats, torch.device(device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ranks = dist.get_world_size()
    added = statistics.median(joint - single for joint, single in zip(jointly, singly, strict=True))
    travels = 4 * (ranks * poses + parameters)
    return Shared(ranks, ranks * poses, parameters, statistics.median(singly), added, travels)


def as_table(found: Sequence[Shared]) -> str:
    """In Markdown."""
    heads = ["ranks", "poses", "parameters", "own poses", "sharing adds", "travels"]
    rows = [
        [
            str(shared.ranks),
            str(shared.poses),
            f"{shared.parameters / 1e6:.2f} M",
            f"{shared.alone * 1e3:.1f} ms",
            f"{shared.added * 1e3:.1f} ms",
            f"{shared.travels / 1e6:.2f} MB",
        ]
        for shared in found
    ]
    return table(heads, rows)


def save(found: Sequence[Shared], path: str | Path) -> None:
    """As JSON."""
    Path(path).write_text(json.dumps([asdict(shared) for shared in found], indent=1))

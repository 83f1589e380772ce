"""What the other ranks see when one is killed, or raises, at any moment; as a program it prints a table of all events.

python tests/rank_failures.py
"""

import copy
import itertools
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from multiprocess import Fault, error_of, run_on_ranks
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradhooks

VICTIM = 1
WAYS = ("pose parallel", "DDP", "FSDP2")
MOMENTS = ("before", "forward", "between", "backward")
ENDS = ("SIGKILL", "exit", "sleep")
TIMEOUT = 4.0
"""Seconds, of collectives: what a user sets."""


class LocalError(Exception):
    """Raised by the user's code on one rank."""


def end_here(how: str) -> None:
    """End, leave or stop this rank."""
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "sleep":  # it is busy with something else, for longer than the timeout
        time.sleep(30)
    raise LocalError


class EndInBackward(torch.autograd.Function):
    """Passes its input on, and ends the process in its backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, how: str) -> Tensor:
        ctx.how = how
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        end_here(ctx.how)


class Model(nn.Module):
    """Has a buffer that counts, and ends its process where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.ends: tuple[str, str] | None = None

    def forward(self, pose: Tensor) -> Tensor:
        self.seen += 1
        hidden = self.first(pose).tanh()
        if self.ends is not None and self.seen % 3 == 2:
            moment, how = self.ends
            if moment == "forward":
                end_here(how)
            if moment == "backward" and hidden.requires_grad:
                hidden = EndInBackward.apply(hidden, how)
        prediction: Tensor = self.second(hidden)
        return prediction


class Seen(NamedTuple):
    """What a surviving rank has seen.

    Attributes:
        seconds: From the begin of the step to its error.
        kind: The class of the error.
        message: Its message.
        unchanged: Whether `.grad`, parameters and buffers are as before.
        goes_on: Whether the next batch, in a new group of the survivors, is right.
        own_error: The message of an error of this rank's own, in the group that has failed.
    """

    seconds: float
    kind: str
    message: str
    unchanged: bool
    goes_on: bool | None = None
    own_error: str = ""


def state_of(model: nn.Module) -> list[Tensor]:
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *(each.grad for each in model.parameters() if each.grad is not None),
    ]
    return [(each.to_local() if hasattr(each, "to_local") else each).detach().clone() for each in tensors]


def build(way: str) -> tuple[Any, Callable[..., Any], gradhooks.MultiPose]:
    torch.manual_seed(0)
    model = Model()
    if way == "FSDP2":
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not imported by processes without shards

        for part in (model.first, model):
            fully_shard(part)
    group = dist.group.WORLD if way == "pose parallel" else None
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", process_group=group)
    return model, DistributedDataParallel(scorer) if way == "DDP" else scorer, scorer


def poses_of(rank: int) -> list[Tensor]:
    return list(torch.randn(3, 4, generator=torch.Generator().manual_seed(rank)))


def lose_a_rank(rank: int, way: str, moment: str, how: str, new_store: str) -> Seen:
    """Run a good step and one in which the victim ends; return what this rank sees of it."""
    model, module, scorer = build(way)
    module(poses_of(rank)).combined.sum().backward()
    before = state_of(model)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), dist.group.WORLD)
    start = time.monotonic()
    kind = message = ""
    try:
        if rank == VICTIM:
            model.ends = (moment, how)
            if moment == "before":  # it has fewer batches than the others
                end_here(how)
        loss = module(poses_of(rank)).combined.square().sum()
        if rank == VICTIM and moment == "between":
            end_here(how)
        before = state_of(model)
        loss.backward()
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    seconds = time.monotonic() - start
    unchanged = all(map(torch.equal, state_of(model), before))
    if way != "pose parallel":
        return Seen(seconds, kind, message, unchanged)
    _, own_error = error_of(scorer, 3)
    return Seen(seconds, kind, message, unchanged, go_on(rank, scorer, new_store), own_error)


def go_on(rank: int, scorer: gradhooks.MultiPose, path: str) -> bool:
    """Make a new group of the survivors, and return whether their gradient is that of the full graph."""
    size = dist.get_world_size() - 1
    members = [each for each in range(size + 1) if each != VICTIM]
    dist.destroy_process_group()
    limit = timedelta(seconds=10)
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=members.index(rank), world_size=size, timeout=limit)
    scorer.process_group = dist.group.WORLD
    model: Any = scorer.model
    reference = copy.deepcopy(model)
    for each in (model, reference):
        each.zero_grad()
    scorer(poses_of(rank)).combined.sum().backward()
    poses = [pose for member in members for pose in poses_of(member)]
    gradhooks.testing.full_graph(reference, poses, gradhooks.combinations.Boltzmann()).combined.sum().backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return all(torch.allclose(one.grad, other.grad, atol=1e-5) for one, other in pairs)


def survivors(way: str, moment: str, how: str, folder: str) -> list[Any]:
    """Return what each surviving rank has seen."""
    path = os.path.join(folder, f"{way} {moment} {how}")
    results = run_on_ranks(lose_a_rank, way, moment, how, path, world_size=3, timeout=80, keep_faults=True)
    return [result for rank, result in enumerate(results) if rank != VICTIM]


def main() -> None:
    import tempfile  # noqa: PLC0415 - of the program only

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way, moment, how in itertools.product(WAYS, MOMENTS, ENDS):
            for result in survivors(way, moment, how, folder):
                if isinstance(result, Fault):
                    result = Seen(float("nan"), result.kind, result.message, unchanged=False)  # noqa: PLW2901
                rows.append([way, moment, how, *result._replace(message=result.message[:200])[:-1]])
    headers = ["ranks share by", "moment", "event", "seconds", "error", "message", "unchanged", "goes on"]
    print(tabulate(rows, headers, tablefmt="pipe", floatfmt=".1f", maxcolwidths=[None] * 5 + [80]))  # noqa: T201


if __name__ == "__main__":
    main()

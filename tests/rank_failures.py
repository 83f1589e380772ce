"""What the other ranks see when something differs, fails or ends on one rank; as a program it prints a table.

python tests/rank_failures.py            # all events; ends with 1 if a promise is broken
python tests/rank_failures.py killed     # those with a name that contains "killed"

Promises, for every event:
    1. Nothing hangs: each other rank ends within the timeout of collectives and two seconds.
    2. Nothing aborts: it ends with a Python exception, as does the affected rank, unless it is lost.
    3. Nothing differs silently: if no rank raises, all have the parameters of plain PyTorch.
    4. Between ranks that share groups, all ranks raise an error that names a rank or a pose, and leave gradients,
       parameters and buffers as they were.
"""

import copy
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from multiprocess import Fault, error_of, run_on_ranks
from rank_events import AFFECTED, EVENTS, TIMEOUT, Event, Run
from rank_events.training import DDP, FSDP2, POSE_PARALLEL, local
from tabulate import tabulate
from torch import Tensor

from gradhooks.testing import full_graph

LIMIT = 60.0
"""Seconds: of a row. Processes without an answer are killed then."""
GRACE = 2.0


class Outcome(NamedTuple):
    """What a rank has seen.

    Attributes:
        seconds: From the beginning of the event to the end.
        kind: The class of its error, or an empty string.
        message: The message of its error.
        unchanged: Whether gradients, parameters and buffers are as before the forward or backward that raised.
        parameters: The final parameters; of shards, those of this rank.
        goes_on: Whether the ranks that are left go on in a new group, with the right gradient; None if not tried.
    """

    seconds: float
    kind: str = ""
    message: str = ""
    unchanged: bool = True
    parameters: Sequence[Tensor] = ()
    goes_on: bool | None = None


def train(rank: int, name: str, way: str, plain: bool, new_store: str) -> Outcome:
    """Run the event on this rank."""
    dist.barrier()
    if EVENTS[name].kind == "lost" or not plain:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), dist.group.WORLD)
    run = Run(rank, way, plain=plain)
    try:
        EVENTS[name].happens(run)
    except BaseException as error:
        seen = Outcome(time.monotonic() - run.start, type(error).__name__, str(error), run.is_unchanged())
        if EVENTS[name].kind != "lost" or way != POSE_PARALLEL:
            return seen
        return seen._replace(goes_on=go_on(run, new_store))
    seconds = time.monotonic() - run.start
    return Outcome(seconds, parameters=[local(each).detach().clone() for each in run.module.parameters()])


def go_on(run: Run, new_store: str) -> bool:
    """Return whether an error of this rank still says its cause, and the others go on with the right gradient."""
    _, message = error_of(run.scorer, 3)
    size = dist.get_world_size() - 1
    members = [each for each in range(size + 1) if each != AFFECTED]
    dist.destroy_process_group()
    store, limit = dist.FileStore(new_store, size), timedelta(seconds=10)
    dist.init_process_group("gloo", store=store, rank=members.index(run.rank), world_size=size, timeout=limit)
    run.scorer.process_group = dist.group.WORLD
    reference = copy.deepcopy(run.model)
    for model in (run.model, reference):
        model.zero_grad()
    run.scorer(run.poses()).combined.sum().backward()
    poses = [pose for member in members for pose in run.poses(member)]
    full_graph(reference, poses, run.scorer.combination).combined.sum().backward()
    pairs = zip(run.model.parameters(), reference.parameters(), strict=True)
    right = all(torch.allclose(one.grad, other.grad) for one, other in pairs)
    return right and re.search("^PosesError: .*got one int.* Besides, rank . waited for", message) is not None


def outcomes(name: str, way: str, *, plain: bool = False) -> list[Outcome]:
    """Return what each rank has seen."""
    size = EVENTS[name].ranks
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        results = run_on_ranks(train, name, way, plain, path, world_size=size, timeout=LIMIT, keep_faults=True)
    return [_of_fault(each) if isinstance(each, Fault) else each for each in results]


def _of_fault(fault: Fault) -> Outcome:
    return Outcome(float("nan"), fault.kind, f"{fault.message} {fault.traceback[-300:]}", unchanged=False)


def broken_promises(event: Event, way: str, seen: Sequence[Outcome], plain: Sequence[Outcome] | None) -> list[str]:
    """Return the promises that were not kept."""
    judged = {rank: each for rank, each in enumerate(seen) if rank != AFFECTED or event.kind == "differs"}
    others = {rank: each for rank, each in judged.items() if rank != AFFECTED}
    broken = []
    # DDP of PyTorch, in which the library is not in the call, aborts the affected rank in two events.
    ends = others.values() if event.kind == "lost" or way == DDP else seen
    if any(each.kind in {"NoAnswer", "ProcessDied"} for each in ends):
        broken.append("aborted or hangs")
    if any(each.kind and each.seconds > TIMEOUT + GRACE for each in others.values()):
        broken.append("late")
    raised = [bool(each.kind) for each in others.values()]
    if any(each.goes_on is False for each in others.values()):
        broken.append("does not go on in a new group")
    if any(raised) and not all(raised):
        broken.append("some ranks do not raise")
    if way in event.exact and any(each.kind for each in seen):
        broken.append("raises, where it is allowed")
    if way in event.refused:
        broken += _refusal(way, list(judged.values()))
    if plain is not None:
        broken += _difference(event, way, seen, plain)
    return broken


def _refusal(way: str, seen: Sequence[Outcome]) -> list[str]:
    if not all(each.kind for each in seen):
        return ["not refused"]
    if way != POSE_PARALLEL:
        return []
    named = all(re.search(r"\brank \d|\bpose \d", each.message) for each in seen if each.kind != "KeyboardInterrupt")
    return [
        *([] if named else ["no rank is named"]),
        *([] if all(each.unchanged for each in seen) else ["state changed"]),
    ]


def _difference(event: Event, way: str, seen: Sequence[Outcome], plain: Sequence[Outcome]) -> list[str]:
    if any(each.kind for each in plain):
        return ["plain PyTorch raises, gradhooks does not"]
    found = [list(each.parameters) for each in seen]
    if way == FSDP2:
        found = [[torch.cat(shards) for shards in zip(*found, strict=True)]] * len(found)
    for parameters, expected in zip(found, plain, strict=True):
        for one, other in zip(parameters, expected.parameters, strict=True):
            if one.shape != other.shape or not (one - other).abs().max() <= event.tolerance:
                return ["differs silently from plain PyTorch"]
    return []


def judge(name: str, way: str) -> tuple[list[Outcome], list[str]]:
    """Run an event, and return what each rank has seen and the broken promises."""
    seen = outcomes(name, way)
    plain = None if any(each.kind for each in seen) else outcomes(name, way, plain=True)
    return seen, broken_promises(EVENTS[name], way, seen, plain)


def rows_of(name: str, way: str) -> list[list[Any]]:
    """Return the rows of an event: one for the other ranks, and one for the affected rank."""
    seen, broken = judge(name, way)
    lost = EVENTS[name].kind == "lost"
    rows = []
    for rank, each in enumerate(seen):
        if rank <= AFFECTED and not (lost and rank == AFFECTED):
            error = f"{each.kind}: {_brief(each.message)}" if each.kind else "as plain PyTorch"
            rows.append([name, way, rank, each.seconds, error, "yes" if each.unchanged else "no", ", ".join(broken)])
    return rows


def _brief(message: str) -> str:
    return re.sub(r"\[/\S*/gloo/\S+\] | This is typically caused .*|Exception raised from .*", "", message)[:230]


def main(pattern: str = "") -> int:
    headers = ["event on rank 1", "ranks share", "rank", "seconds", "it ends with", "unchanged", "broken promises"]
    rows: list[list[Any]] = []
    for name, event in EVENTS.items():
        for way in event.ways:
            if pattern in f"{name} {way}":
                rows += rows_of(name, way)
                if os.environ.get("VERBOSE"):
                    print(rows[-2:], flush=True)  # noqa: T201
    print(tabulate(rows, headers, tablefmt="pipe", floatfmt=".1f"))  # noqa: T201
    broken = {(row[0], row[1]) for row in rows if row[-1]}
    print(f"{len({(row[0], row[1]) for row in rows})} events, {len(broken)} with broken promises")  # noqa: T201
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Find out which ranks no longer answer, after a collective has failed.

Rules:
    1. Each rank on which a collective fails says so in the store through which the ranks have met. A rank that does not
       within `ANSWER_SECONDS` is gone, or runs something else.
    2. A rank learns of a failure only through its own connections. So each one breaks those that it still has, which
       are of no use any more; otherwise the neighbours of its neighbours would wait until their timeout.
    3. A store may be gone with the rank that served it. It is asked in a thread, and given up after some time.
"""

import contextlib
import re
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

ANSWER_SECONDS = 1.0
POLL_SECONDS = 0.02
_UNUSED_TAG = 2**20 + 1
_NAMES_BACKEND = re.compile("gloo|NCCL|ProcessGroup|collective|connection|timed out|timeout|socket", re.IGNORECASE)

_failures: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def is_of_backend(error: RuntimeError) -> bool:
    """Return whether an error was raised by a collective, and not by a model. Gloo has no class for its errors."""
    return isinstance(error, dist.DistError) or _NAMES_BACKEND.search(str(error)) is not None


def describe_lost_ranks(group: "dist.ProcessGroup", where: str, error: RuntimeError) -> str:
    """Return a message that names the ranks that do not answer.

    Args:
        group: The group whose collective has failed.
        where: What this rank was doing: `"in the forward"`.
        error: The error of the backend.
    """
    return (
        f"rank {dist.get_rank(group)} waited for the other ranks {where}, and the collective failed. "
        f"{_who_is_lost(group, where)}. `.grad`, parameters and buffers are as before. Restart the ranks from a "
        "checkpoint, or go on without those that are gone: in a new process group, set as scorer.process_group, or "
        f"alone with None. ({type(error).__name__}: {error})"
    )


def _who_is_lost(group: "dist.ProcessGroup", where: str) -> str:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    number = _failures[group] = _failures.get(group, 0) + 1
    answers: dict[int, str] = {}
    store = _store_of(group)
    if store is not None:
        keys = [f"gradhooks/failure {number}/{other}" for other in range(size)]
        thread = threading.Thread(target=_ask, args=(store, keys, rank, where, answers), daemon=True)
        thread.start()
        if dist.get_backend(group) == "gloo":
            _break_connections(group, rank, size)
        thread.join(2 * ANSWER_SECONDS)
    if rank not in answers:
        return (
            "Which rank is gone is not known, because the store of the process group cannot be reached; often the "
            "rank that is gone has served it"
        )
    missing = [other for other in range(size) if other not in answers]
    others = "; ".join(f"rank {other} was {answers[other]}" for other in sorted(answers))
    if not missing:
        return f"All ranks still answer, so a connection failed, or a rank came too late: {others}"
    named = f"rank {missing[0]} does" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} do"
    return f"Of {size} ranks, {named} not answer: killed, ended, or busy with something else; {others}"


def _store_of(group: "dist.ProcessGroup") -> Any:
    find = getattr(dist.distributed_c10d, "_get_process_group_store", None)  # private
    try:
        return None if find is None else find(group)
    except KeyError:  # the group was destroyed
        return None


def _ask(store: Any, keys: Sequence[str], rank: int, where: str, answers: dict[int, str]) -> None:
    """Write that this rank is there, and collect the answers of the others (rule 1)."""
    with contextlib.suppress(Exception):  # the store is gone (rule 3)
        store.set(keys[rank], where)
        answers[rank] = where
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(answers) < len(keys) and time.monotonic() < deadline:
            for other, key in enumerate(keys):
                if other not in answers and store.check([key]):
                    answers[other] = store.get(key).decode()
            time.sleep(POLL_SECONDS)


def _break_connections(group: "dist.ProcessGroup", rank: int, size: int) -> None:
    """Wait for a message that nobody sends: gloo closes all connections of a group when this times out (rule 2)."""
    for source in range(size):
        if source != rank and _times_out(group, source):
            return


def _times_out(group: "dist.ProcessGroup", source: int) -> bool:
    """Return whether waiting for a message times out; False if there is no connection."""
    try:
        group.recv([torch.zeros(1)], source, _UNUSED_TAG).wait(timedelta(milliseconds=1))
    except RuntimeError as error:
        return "imed out" in str(error)
    return False

"""Runs a function on several ranks: processes that talk to each other through gloo.

    def largest(rank: int, values: list[float]) -> float:  # at the top of a module, where the processes find it
        found = torch.tensor(values[rank])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    assert on_ranks(largest, [1.0, 2.0], world_size=2) == [2.0, 2.0]

Rules:
    1. Nobody chooses a port: ranks meet in a file, and gloo asks the system for what it needs.
    2. Nothing hangs. Collectives give up at half of `timeout`, so that the rank that waits can tell its traceback; who
       has not answered at `timeout` is killed, and prints where it stood shortly before.
    3. A rank that raises leaves its process group at once, as a process that dies does. One that returns stays in it
       until all have: they may still be reading what it sent.
    4. Starting costs seconds, so processes wait for the next call, each of which is a new process group. They are
       replaced after a fault, which leaves who knows what behind, and where `fresh` asks for it.
"""

import atexit
import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

STARTING = 180.0  # seconds; imports of torch by several processes at once, on a busy machine


class RankError(Exception):
    """Collectives raised, died or did not answer."""


@dataclass(frozen=True)
class Fault:
    """What stands in the place of a rank's result: `kind` is the name of the exception's class."""

    kind: str
    message: str
    traceback: str = ""
    when: float = float("inf")


def on_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    world_size: int = 2,
    timeout: float = 60.0,
    keep_faults: bool = False,
    fresh: bool = False,
) -> list[Any]:
    """`function(rank, *arguments)` on each rank of a new process group; the results, by rank.

    Args:
        function: Found by its name at the top of a module.
        arguments: Pickled, as is what is returned.
        world_size: How many ranks.
        timeout: Seconds until every rank must have answered.
        keep_faults: Wait for every rank, and return a `Fault` as the result of one that raised.
        fresh: In new processes.

    Raises:
        RankError: A rank raised, unless `keep_faults`. Shows the traceback of the one that was first; all are killed.
    """
    if fresh:
        _pool.close()
    answers = _pool.answers(function, arguments, world_size, timeout, keep_faults)
    faults = sorted(
        ((rank, answer) for rank, answer in enumerate(answers) if isinstance(answer, Fault)),
        key=lambda found: found[1].when,
    )
    if faults and not keep_faults:
        raise RankError(
            "\n".join(f"rank {rank}: {fault.kind}: {fault.message}\n{fault.traceback}" for rank, fault in faults)
        )
    return answers


class _Task(NamedTuple):
    """Where a rank finds the others."""

    rank: int
    world_size: int
    meeting: str
    timeout: float
    work: bytes  # pickled apart, so that a module that cannot be imported is a fault like others


class _Pool:
    """The processes of this one."""

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def answers(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], size: int, timeout: float, patient: bool
    ) -> list[Any]:
        meeting = self._ready(size)
        work = pickle.dumps((function, arguments))
        for rank, (_, pipe) in enumerate(self._workers[:size]):
            pipe.send_bytes(pickle.dumps(_Task(rank, size, meeting, timeout, work)))
        answers = self._collected(size, timeout, patient)
        if any(isinstance(answer, Fault) for answer in answers):
            self.close()  # Rule 4
        return answers

    def _ready(self, size: int) -> str:
        """Enough processes; the file in which they meet."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        new = [_started() for _ in range(len(self._workers), size)]
        self._workers += new
        for process, pipe in new:
            if not pipe.poll(STARTING) or isinstance(_told(process, pipe), Fault):
                self.close()
                raise RankError("a process did not start")
        self._calls += 1
        return str(Path(self._folder.name) / str(self._calls))

    def _collected(self, size: int, timeout: float, patient: bool) -> list[Any]:
        began = time.monotonic()
        answers: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:size])}
        while len(answers) < size:
            pending = [pipe for pipe, rank in pipes.items() if rank not in answers]
            ready = connection.wait(pending, max(0.0, began + timeout - time.monotonic()))
            answers.update({rank: _told(*self._workers[rank]) for rank in (pipes[pipe] for pipe in ready)})
            faulty = any(isinstance(answer, Fault) for answer in answers.values())
            if not ready or (faulty and not patient):
                break
        silent = Fault("NoAnswer", f"had not answered after {time.monotonic() - began:.1f} s")
        return [answers.get(rank, silent) for rank in range(size)]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _started() -> tuple[BaseProcess, Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # else the end of the process would go unnoticed
    return process, ours


def _told(process: BaseProcess, pipe: Connection) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())  # noqa: S301 - written by a process of ours
    except (EOFError, OSError):
        process.join()
        return Fault("ProcessDied", f"exit code {process.exitcode}")


def _serve(pipe: Connection) -> None:
    """What a process does until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it kills it
    torch.set_num_threads(1)
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:  # whatever the machine's name may resolve to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    pipe.send_bytes(pickle.dumps("ready"))
    with contextlib.suppress(EOFError):
        while True:
            task = pickle.loads(pipe.recv_bytes())  # noqa: S301
            _leave()
            try:
                pipe.send_bytes(pickle.dumps(_carried_out(task)))
            except BaseException as fault:
                told = Fault(type(fault).__name__, str(fault), traceback.format_exc(), time.monotonic())
                pipe.send_bytes(pickle.dumps(told))
                _leave()  # Rule 3


def _carried_out(task: _Task) -> Any:
    with _told_where_it_stands(0.9 * task.timeout):
        torch.manual_seed(0)
        limit = timedelta(seconds=task.timeout / 2)
        store = dist.FileStore(task.meeting, task.world_size)
        store.set_timeout(limit)
        dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.world_size, timeout=limit)
        function, arguments = pickle.loads(task.work)  # noqa: S301
        return function(task.rank, *arguments)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _told_where_it_stands(after: float) -> Iterator[None]:
    faulthandler.dump_traceback_later(after, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


_pool = _Pool()
atexit.register(_pool.close)

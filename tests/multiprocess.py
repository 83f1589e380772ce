"""Run a function on several ranks: processes in one gloo process group.

    def maximum(rank: int, values: list[float]) -> float:  # at module level, so that the processes can import it
        tensor = torch.tensor(values[rank])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    assert run_on_ranks(maximum, [1.0, 2.0], world_size=2) == [2.0, 2.0]

Rules:
    1. No ports are chosen here: ranks find each other through a file, and gloo asks the system for free ports.
    2. Every call ends. Collectives time out at half of `timeout`, so that a waiting rank can report its traceback. A
       rank without a result at `timeout` is killed; shortly before, it prints its stack.
    3. A rank that raises leaves its process group at once, like a process that dies. A rank that returns stays in the
       group until the next call, because other ranks may still be reading what it sent.
    4. Starting processes takes time, so later calls reuse them, each with a new process group. They are replaced after
       a fault, since its effects are unknown, and with `fresh=True`.
"""

import atexit
import contextlib
import faulthandler
import gc
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
from multiprocessing import connection, get_all_start_methods, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from loguru import logger

START_TIMEOUT = 180.0  # seconds; several processes import torch at once, possibly on a busy machine
GRACE = 1.0  # seconds that the other ranks have to report their own fault after the first one


class RankError(Exception):
    """A rank raised, died or did not return in time."""


@dataclass(frozen=True)
class Fault:
    """Result of a rank that failed. `kind` is the name of the exception class, `when` the time of the failure."""

    kind: str
    message: str
    traceback: str = ""
    when: float = float("inf")


def run_on_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    world_size: int = 2,
    timeout: float = 60.0,
    keep_faults: bool = False,
    fresh: bool = False,
) -> list[Any]:
    """Run `function(rank, *arguments)` on each rank of a new process group and return the results in rank order.

    Args:
        function: A function at module level.
        arguments: Picklable arguments. Results must be picklable too.
        world_size: Number of ranks.
        timeout: Seconds until every rank must have returned.
        keep_faults: Wait for every rank, and return a `Fault` as the result of a rank that raised.
        fresh: Start new processes.

    Raises:
        RankError: A rank failed, and `keep_faults` is false. Shows all tracebacks, that of the first failure first.
    """
    if fresh:
        _pool.close()
    results = _pool.run(function, arguments, world_size, timeout, wait_for_all=keep_faults)
    faults = sorted(
        ((rank, result) for rank, result in enumerate(results) if isinstance(result, Fault)),
        key=lambda pair: pair[1].when,
    )
    if faults and not keep_faults:
        raise RankError(
            "\n".join(f"rank {rank}: {fault.kind}: {fault.message}\n{fault.traceback}" for rank, fault in faults)
        )
    return results


def error_of(function: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
    """Return class name and message of the error that `function(*arguments)` raises; `("", "")` if it raises none."""
    try:
        function(*arguments)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "", ""


@contextlib.contextmanager
def log_messages() -> Iterator[list[str]]:
    """Collect the messages that gradhooks logs in the block."""
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="DEBUG")
    logger.enable("gradhooks")
    try:
        yield messages
    finally:
        logger.disable("gradhooks")
        logger.remove(sink)


class _Task(NamedTuple):
    rank: int
    world_size: int
    meeting_file: str
    timeout: float
    work: bytes  # pickled separately, so that a failing import is reported like other faults


class _Pool:
    """Worker processes that run tasks until they are closed."""

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        size: int,
        timeout: float,
        *,
        wait_for_all: bool,
    ) -> list[Any]:
        meeting_file = self._prepare(size)
        work = pickle.dumps((function, arguments))
        for rank, (_, pipe) in enumerate(self._workers[:size]):
            pipe.send_bytes(pickle.dumps(_Task(rank, size, meeting_file, timeout, work)))
        results = self._collect(size, timeout, wait_for_all)
        if any(isinstance(result, Fault) for result in results):
            self.close()  # rule 4
        return results

    def _prepare(self, size: int) -> str:
        """Start missing processes and return the path of the file through which they meet."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        new = [_start_worker() for _ in range(len(self._workers), size)]
        self._workers += new
        for process, pipe in new:
            if not pipe.poll(START_TIMEOUT) or isinstance(_receive(process, pipe), Fault):
                self.close()
                raise RankError("a process did not start")
        self._calls += 1
        return str(Path(self._folder.name) / str(self._calls))

    def _collect(self, size: int, timeout: float, wait_for_all: bool) -> list[Any]:
        start = time.monotonic()
        deadline = start + timeout
        results: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:size])}
        while len(results) < size:
            pending = [pipe for pipe, rank in pipes.items() if rank not in results]
            ready = connection.wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            results.update({rank: _receive(*self._workers[rank]) for rank in (pipes[pipe] for pipe in ready)})
            if not wait_for_all and any(isinstance(result, Fault) for result in results.values()):
                deadline = min(deadline, time.monotonic() + GRACE)
        missing = Fault("NoAnswer", f"had not answered after {time.monotonic() - start:.1f} s")
        return [results.get(rank, missing) for rank in range(size)]

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


def _start_worker() -> tuple[BaseProcess, Connection]:
    parent_end, child_end = _context.Pipe()
    process: BaseProcess = _context.Process(target=_serve, args=(child_end,), daemon=True)
    process.start()
    child_end.close()  # so that the pipe signals the end of the process
    return process, parent_end


def _receive(process: BaseProcess, pipe: Connection) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())  # noqa: S301 - written by our own process
    except (EOFError, OSError):
        process.join()
        return Fault("ProcessDied", f"exit code {process.exitcode}")


def _serve(pipe: Connection) -> None:
    """Run tasks until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills its workers itself
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is never garbage: without it, a full collection takes no time
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:  # independent of what the host name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    pipe.send_bytes(pickle.dumps("ready"))
    with contextlib.suppress(EOFError):
        while True:
            task = pickle.loads(pipe.recv_bytes())  # noqa: S301
            _leave_group()
            try:
                pipe.send_bytes(pickle.dumps(_run_task(task)))
            except BaseException as error:
                fault = Fault(type(error).__name__, str(error), traceback.format_exc(), time.monotonic())
                pipe.send_bytes(pickle.dumps(fault))
                _leave_group()  # rule 3


def _run_task(task: _Task) -> Any:
    with _print_stack_after(0.9 * task.timeout):
        torch.manual_seed(0)
        limit = timedelta(seconds=task.timeout / 2)
        store = dist.FileStore(task.meeting_file, task.world_size)
        store.set_timeout(limit)
        dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.world_size, timeout=limit)
        function, arguments = pickle.loads(task.work)  # noqa: S301
        return function(task.rank, *arguments)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _print_stack_after(seconds: float) -> Iterator[None]:
    faulthandler.dump_traceback_later(seconds, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# The fork server imports once for all processes, and starts no threads before it forks. DDP and FSDP2 import
# torch._dynamo when they are used first, which takes longer than most tests.
_context: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
_context.set_forkserver_preload(["torch.distributed.checkpoint.state_dict", "torch._dynamo", "gradhooks.testing"])
_pool = _Pool()
atexit.register(_pool.close)

"""Steps that take turns, so that whatever else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from gradhooks.profiling.peak_memory import PeakMemory

Step = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait for what was begun on `device`, so that a clock tells of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Step, device: torch.device) -> float:
    """What one step takes."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(steps: Sequence[Step], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each step, round by round."""
    rounds = [[seconds_of(step, device) for step in steps] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def ratio(seconds: Iterable[float], others: Iterable[float]) -> float:
    """The median, over the rounds, of what one step takes relative to another."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def peak_of(step: Step, device: torch.device) -> int:
    """Bytes that a step needs at most, beyond what is there."""
    with PeakMemory(device) as memory:
        step()
    return memory.peak

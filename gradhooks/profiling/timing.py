"""Interleaved timing, so that background load affects all candidates equally."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

Step = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished what was queued, so that a clock measures it."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def seconds_of(step: Step, device: torch.device) -> float:
    """Return the time that one call of `step` takes."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def interleaved_seconds(
    steps: Sequence[Step],
    repeats: int,
    device: torch.device,
    around: Callable[[int], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> list[list[float]]:
    """Run all steps in each of `repeats` rounds; return for each step its seconds by round.

    Args:
        steps: The steps.
        repeats: The number of rounds.
        device: On which they run.
        around: Gets the number of a step; a step runs in what it returns, which is not timed.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for index, step in enumerate(steps):
            with around(index):
                seconds[index].append(seconds_of(step, device))
    return seconds


def median_ratio(seconds: Iterable[float], reference: Iterable[float]) -> float:
    """Return the median, over the rounds, of the time of one step relative to another in the same round."""
    return statistics.median(one / other for one, other in zip(seconds, reference, strict=True))

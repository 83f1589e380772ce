"""Interleaved timing, so that background load affects all candidates equally."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

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


def interleaved_seconds(steps: Sequence[Step], repeats: int, device: torch.device) -> list[list[float]]:
    """Run all steps in each of `repeats` rounds; return for each step its seconds by round."""
    rounds = [[seconds_of(step, device) for step in steps] for _ in range(repeats)]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def median_ratio(seconds: Iterable[float], reference: Iterable[float]) -> float:
    """Return the median, over the rounds, of the time of one step relative to another in the same round."""
    return statistics.median(one / other for one, other in zip(seconds, reference, strict=True))

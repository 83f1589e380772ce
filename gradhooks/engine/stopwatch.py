"""Stopwatch: how long something took on a device, without waiting for it."""

import time

import torch


class Stopwatch:
    """Seconds from `start()` to `stop()`; on CUDA between two events, which nobody waits for.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []

    def start(self) -> None:
        self._marks = [self._now()]

    def stop(self) -> None:
        self._marks.append(self._now())

    @property
    def seconds(self) -> float | None:
        """None while the device has not come to the end."""
        start, stop = self._marks
        if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
            return start.elapsed_time(stop) / 1e3 if stop.query() else None
        return stop - start  # type: ignore[operator]

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

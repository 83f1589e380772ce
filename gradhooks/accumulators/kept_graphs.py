"""KeptGraphs: graphs that are kept for the outer backward, within a number of bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from gradhooks.engine.saved_tensors import record_saved_tensors

MARGIN = 4
"""Graphs are not measured, which takes time, if the remaining ones fit at this multiple of the largest size seen."""


class KeptGraph(NamedTuple):
    """Live predictions, shape `(n, *prediction)`, the bytes of their graph, and their log-weight."""

    predictions: Tensor
    size: int
    log_weight: float


class KeptGraphs:
    """Keeps the graphs of the chunks with the largest log-weights, as many as fit.

    Args:
        budget: Bytes.
        excluded: Addresses of storages that do not count: parameters and buffers.
    """

    def __init__(self, budget: int, excluded: set[int]) -> None:
        self._budget = budget
        self._excluded = excluded
        self._graphs: dict[int, KeptGraph] = {}  # by the first pose of the chunk
        self._size = self._largest = 0
        self._saved: dict[int, int] = {}

    def has_room_for(self, count: int) -> bool:
        """Return whether `count` more graphs fit, each `MARGIN` times as large as the largest so far."""
        return self._largest > 0 and MARGIN * self._largest * count <= self._budget - self._size

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the graphs that are built in the block."""
        # Saved tensors hold the hooks. If the hooks held `self`, and with it the graphs, they would form a cycle.
        with record_saved_tensors(self._excluded) as self._saved:
            yield

    def offer(self, start: int, predictions: Tensor, log_weight: float) -> bool:
        """Keep the graph that was just built, in place of lighter ones if necessary; return False without room."""
        measured = sum(self._saved.values())
        self._saved = {}
        self._largest = max(self._largest, measured)
        size = measured or MARGIN * self._largest  # an unmeasured graph is charged what was reserved for it
        lighter = sorted((kept.log_weight, key) for key, kept in self._graphs.items() if kept.log_weight < log_weight)
        room = self._budget - self._size
        leaving = []
        for _, key in lighter:
            if room >= size:
                break
            leaving.append(key)
            room += self._graphs[key].size
        if room < size:
            return False
        for key in leaving:
            self._size -= self._graphs.pop(key).size
        self._graphs[start] = KeptGraph(predictions, size, log_weight)
        self._size += size
        return True

    def live_predictions(self, *, release: bool) -> dict[int, Tensor]:
        """Return the live predictions of each kept chunk by its first pose; with `release` keep none of them."""
        live = {start: kept.predictions for start, kept in self._graphs.items()}
        if release:
            self._graphs.clear()
        return live

    @property
    def pose_count(self) -> int:
        """The number of poses whose graph is kept."""
        return sum(len(kept.predictions) for kept in self._graphs.values())

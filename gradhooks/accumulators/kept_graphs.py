"""Graphs that are kept for the outer backward, within a budget of bytes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.memory import free_bytes, noting_saved

# To measure costs time. Graphs are not measured where all that are to come would fit though they were so much larger.
MARGIN = 4
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class KeptGraph(NamedTuple):
    """Live predictions, of shape `(n, *prediction)`, what their graph holds, and what they weigh."""

    predictions: Tensor
    size: int
    weight: float


class KeptGraphs:
    """Keeps the graphs of the chunks that weigh most, as many as fit.

    Args:
        budget: Bytes.
        known: Storages that are there anyway: parameters and buffers.
    """

    def __init__(self, budget: int, known: set[int]) -> None:
        self._budget = budget
        self._known = known
        self._graphs: dict[int, KeptGraph] = {}  # by the first pose of the chunk
        self._size = self._largest = 0
        self._saved: dict[int, int] = {}

    def has_room_for(self, more: int) -> bool:
        """Whether so many more surely fit, each several times as large as the largest so far."""
        return self._largest > 0 and MARGIN * self._largest * more <= self._budget - self._size

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count what the graphs that are built meanwhile keep alive."""
        # Every saved tensor holds the hooks: if those held `self`, and with it the graphs, they would close a cycle.
        with noting_saved(self._known) as self._saved:
            yield

    def offer(self, start: int, predictions: Tensor, weight: float) -> bool:
        """Keep the graph just built, if need be in the place of lighter ones; False if there is no room."""
        measured = sum(self._saved.values())
        self._saved = {}
        self._largest = max(self._largest, measured)
        size = measured or MARGIN * self._largest  # one that nobody measured counts as much as was made sure of
        offered = KeptGraph(predictions, size, weight)
        lighter = sorted((graph.weight, place) for place, graph in self._graphs.items() if graph.weight < weight)
        room = self._budget - self._size
        leaving = []
        for _, place in lighter:
            if room >= offered.size:
                break
            leaving.append(place)
            room += self._graphs[place].size
        if room < offered.size:
            return False
        for place in leaving:
            self._size -= self._graphs.pop(place).size
        self._graphs[start] = offered
        self._size += offered.size
        return True

    def live(self, *, forget: bool) -> dict[int, Tensor]:
        """The live predictions of each chunk that is kept, by its first pose."""
        live = {start: graph.predictions for start, graph in self._graphs.items()}
        if forget:
            self._graphs.clear()
        return live

    def __len__(self) -> int:
        return sum(len(graph.predictions) for graph in self._graphs.values())


def budget_in_bytes(retain: str | float | None, device: torch.device) -> int:
    """What `retain` allows on a device: `"2GiB"`, a fraction of what is free now, or a number of bytes.

    Raises:
        ValueError: It is none of these.
    """
    if retain is None:
        return 0
    if isinstance(retain, str):
        written = re.fullmatch(r"([\d.]+) ?(\w+)", retain.strip())
        if written is not None and written[2] in UNITS:
            return int(float(written[1]) * UNITS[written[2]])
    elif isinstance(retain, float) and 0 <= retain <= 1:
        return int(retain * free_bytes(device))
    elif isinstance(retain, int) and retain >= 0:
        return retain
    raise ValueError(
        f"retain takes bytes ('2GiB', 2_000_000) or a fraction of what is free (0.5), got {retain!r}; units are "
        f"{', '.join(UNITS)}"
    )

"""Event: what happens on one rank, and what must come of it."""

from collections.abc import Callable
from typing import NamedTuple

from rank_events.training import POSE_PARALLEL, WAYS, Run

Function = Callable[[Run], None]


class Event(NamedTuple):
    """An event.

    Attributes:
        happens: Trains, with the event on the affected rank.
        kind: "differs", "raises", "order" or "lost".
        ways: Where it can happen.
        exact: Where all ranks must go on, with the result of plain PyTorch.
        refused: Where all ranks must raise.
        tolerance: Of the comparison with plain PyTorch.
        ranks: How many.
    """

    happens: Function
    kind: str
    ways: tuple[str, ...]
    exact: tuple[str, ...]
    refused: tuple[str, ...]
    tolerance: float
    ranks: int


EVENTS: dict[str, Event] = {}


def event(
    kind: str,
    *,
    ways: tuple[str, ...] = WAYS,
    exact: tuple[str, ...] = (),
    refused: tuple[str, ...] | None = None,
    tolerance: float = 1e-10,
    ranks: int = 2,
) -> Callable[[Function], Function]:
    """Add the decorated function to `EVENTS`. By default pose parallel must refuse what it does not allow."""

    def decorate(function: Function) -> Function:
        default = tuple(way for way in ways if way == POSE_PARALLEL and way not in exact)
        name = function.__name__.replace("_", " ")
        EVENTS[name] = Event(function, kind, ways, exact, default if refused is None else refused, tolerance, ranks)
        return function

    return decorate

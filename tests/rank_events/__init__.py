"""Events on one rank of several, for `rank_failures.py`: each trains, and something differs, fails or ends."""

from rank_events import differences, errors, lost, order
from rank_events.event import EVENTS, Event
from rank_events.lost import TIMEOUT
from rank_events.training import AFFECTED, WAYS, Run

__all__ = ["AFFECTED", "EVENTS", "TIMEOUT", "WAYS", "Event", "Run", "differences", "errors", "lost", "order"]

"""ContainerWatch: whether any of many containers changed."""

from collections import deque
from collections.abc import Iterable
from itertools import chain
from typing import Any

from gradhooks.engine.containers import ContainerRecord

LARGE = 1024  # items; of larger containers that were not seen to change, only length and ends are compared


class ContainerWatch:
    """Tells in a few calls of C whether any of many containers changed since their records were made.

    Values are compared by identity and, where that differs, by `==`: an equal number is no change. What cannot be
    compared counts as changed.
    """

    def __init__(self, records: Iterable[ContainerRecord]) -> None:
        unique = list({id(record.target): record for record in records}.values())
        targets = [record.target for record in unique]
        self._targets = targets
        self._lengths = list(map(len, targets))
        self._views: list[Iterable[Any]] = []
        self._large = [target for target in targets if len(target) > LARGE and isinstance(target, (list, deque))]
        for record in unique:
            if len(record.target) <= LARGE:
                self._views += record.views()
        self._items = tuple(chain.from_iterable(self._views))
        self._ends = self._read_ends()

    def unchanged(self) -> bool:
        """Return whether nothing shows that a container changed."""
        try:
            return (
                list(map(len, self._targets)) == self._lengths
                and tuple(chain.from_iterable(self._views)) == self._items
                and self._read_ends() == self._ends
            )
        except Exception:  # `==` of any object
            return False

    def _read_ends(self) -> list[Any]:
        return [end for target in self._large for end in (target[0], target[-1])]

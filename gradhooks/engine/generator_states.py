"""GeneratorStates: the states of all random generators in use."""

from collections.abc import Iterable
from typing import Any

from gradhooks.random_state import RandomSource


class GeneratorStates:
    """Records and restores the states of several random sources.

    A costly source from which no forward was seen to draw is read only where `every` is asked for.

    Args:
        sources: The sources.
    """

    def __init__(self, sources: Iterable[RandomSource]) -> None:
        self._sources = tuple(sources)
        self._states: tuple[Any, ...] = (None,) * len(self._sources)
        self._drawn: set[int] = set()

    @property
    def change_count(self) -> int:
        """The number of costly sources from which forwards are known to draw."""
        return sum(self._sources[index].costly for index in self._drawn)

    def begin(self) -> None:
        """Read all states; what was drawn before was not drawn by a forward."""
        self._read(every=True)

    def snapshot(self, *, every: bool) -> tuple[Any, ...]:
        """Return the states of now: those of before, if none changed."""
        self._drawn |= self._read(every=every)
        return self._states

    def restore(self, states: tuple[Any, ...], *, every: bool) -> None:
        """Set all generators to the states of a snapshot."""
        self._drawn |= self._read(every=every)
        for source, wanted, present in zip(self._sources, states, self._states, strict=True):
            if wanted is not present:
                source.set(wanted)
        self._states = states

    def _read(self, *, every: bool) -> set[int]:
        """Read the states; return which ones changed."""
        states = [
            source.read_if_changed(known) if every or not source.costly or index in self._drawn else known
            for index, (source, known) in enumerate(zip(self._sources, self._states, strict=True))
        ]
        changed = {
            index for index, (state, known) in enumerate(zip(states, self._states, strict=True)) if state is not known
        }
        if changed:
            self._states = tuple(states)
        return changed

"""GeneratorStates: the states of all random generators in use."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gradhooks.random_state import RandomSource


class GeneratorStates:
    """Records and restores the states of several random sources.

    A source from which no forward was seen to draw is read only where `every` is asked for.

    Args:
        sources: The sources.

    Attributes:
        states: The states that were read last.
    """

    def __init__(self, sources: Iterable[RandomSource]) -> None:
        self._sources = tuple(sources)
        self.states: tuple[Any, ...] = (None,) * len(self._sources)
        self._drawn: set[int] = set()
        self._found: list[tuple[RandomSource, Any]] = []

    def add(self, source: RandomSource) -> None:
        """Record another source from now on; older snapshots are taken to contain its present state."""
        state = source.get()
        self._drawn.add(len(self._sources))
        self._sources += (source,)
        self.states += (state,)
        self._found.append((source, state))

    @property
    def found(self) -> list[RandomSource]:
        """The sources that were added."""
        return [source for source, _ in self._found]

    @property
    def change_count(self) -> int:
        """The number of sources from which forwards are known to draw."""
        return len(self._drawn)

    def begin(self) -> None:
        """Read all states; what was drawn before was not drawn by a forward."""
        # Reading a state again is faster than a comparison that lets snapshots share it.
        self.states = tuple(
            [
                known if known is not None and source.is_still(known) else source.get()
                for source, known in zip(self._sources, self.states, strict=True)
            ]
        )

    def snapshot(self, *, every: bool) -> tuple[Any, ...]:
        """Return the states of now: those of before, if none changed."""
        self._drawn |= self._read(every=every)
        return self.states

    def restore(self, states: tuple[Any, ...], *, every: bool) -> None:
        """Set all generators to the states of a snapshot."""
        self._drawn |= self._read(every=every)
        missing = len(self._sources) - len(states)
        if missing:
            states = (*states, *(state for _, state in self._found[-missing:]))
        for source, wanted, present in zip(self._sources, states, self.states, strict=True):
            if wanted is not present:
                source.set(wanted)
        self.states = states

    def overwrite(self, states: tuple[Any, ...]) -> None:
        """Set all generators to the states of a snapshot, whatever was recorded since."""
        for source, state in zip(self._sources, states, strict=False):  # fewer, if a source was added since
            source.set(state)

    def _read(self, *, every: bool) -> set[int]:
        """Read the states; return which ones changed."""
        if not (every or self._drawn):
            return set()
        states = [
            source.read_if_changed(known) if every or index in self._drawn else known
            for index, (source, known) in enumerate(zip(self._sources, self.states, strict=True))
        ]
        if all(map(operator.is_, states, self.states)):
            return set()
        changed = {
            index for index, (state, known) in enumerate(zip(states, self.states, strict=True)) if state is not known
        }
        self.states = tuple(states)
        return changed


def devices_in_use(model: nn.Module) -> list[torch.device]:
    """Return the devices whose default generators a model may use."""
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    devices.add(torch.device("cpu"))
    if torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(devices - {torch.device("meta")}, key=str)

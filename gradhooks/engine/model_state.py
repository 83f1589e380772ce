"""ModelState: what a forward may change and a second run must find as it was: buffers and random state.

Rules:
    1. A snapshot is taken before each chunk. Entries that did not change since the last snapshot are shared with it, so
       a model that draws no random numbers and writes no buffers costs one snapshot per group.
    2. A forward of a normalization layer in training writes the running statistics and does not read them, so a second
       run does not need their old values. (Its kernels do not increment the version counter either.) They are still
       restored after a second run.
    3. Values are restored through `.data`, which leaves version counters unchanged: graphs that saved the buffer stay
       valid.
"""

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradhooks.random_state import RandomSource, default_source, user_sources


class BufferCopy(NamedTuple):
    """A buffer tensor, its version, and a copy of its values."""

    tensor: Tensor
    version: int
    value: Tensor


class Snapshot(NamedTuple):
    """The state before a forward, in the order of the sources and buffers of a `ModelState`."""

    random: tuple[Any, ...]
    buffers: tuple[BufferCopy | None, ...]


class ModelState:
    """Takes and restores snapshots of a model's buffers and of the random number generators.

    Args:
        model: The model.
        generators: Random sources in addition to PyTorch's default generators; see `user_sources`.
    """

    def __init__(self, model: nn.Module, generators: Iterable[object] = ()) -> None:
        self._slots = [(module, name) for module in model.modules() for name in module._buffers.keys()]  # noqa: SIM118 - TorchScript
        self.devices = _devices_in_use(model)
        self._sources: list[RandomSource] = [*map(default_source, self.devices), *user_sources(generators)]
        self._latest = Snapshot((None,) * len(self._sources), (None,) * len(self._slots))

    def snapshot(self, *, statistics: bool = False) -> Snapshot:
        """Return the state on which a later forward depends; with `statistics` also running statistics (Rule 2)."""
        latest = self._latest
        # zip without strict=, since this runs for each chunk.
        states = [source.read_if_changed(known) for source, known in zip(self._sources, latest.random)]  # noqa: B905
        random = _shared(states, latest.random)
        buffers = latest.buffers
        if self._slots:
            copies = [_copy(*slot, known, statistics) for slot, known in zip(self._slots, buffers)]  # noqa: B905
            buffers = _shared(copies, buffers)
        if random is not latest.random or buffers is not latest.buffers:
            self._latest = Snapshot(random, buffers)
        return self._latest

    def restore(self, snapshot: Snapshot) -> None:
        """Set random state and buffers to a snapshot."""
        for source, state in zip(self._sources, snapshot.random, strict=True):
            source.set(state)
        for (module, name), copy in zip(self._slots, snapshot.buffers, strict=True):
            if copy is not None:
                copy.tensor.data.copy_(copy.value)  # Rule 3
                module._buffers[name] = copy.tensor

    def unchanged_since(self, snapshot: Snapshot) -> bool:
        """Return whether nothing changed since a snapshot with statistics; False if unknown."""
        for source, state in zip(self._sources, snapshot.random, strict=True):
            if source.read_if_changed(state) is not state:
                return False
        return all(
            module._buffers[name] is None if copy is None else _is_current(module, name, copy)
            for (module, name), copy in zip(self._slots, snapshot.buffers, strict=True)
        )

    @contextmanager
    def preserved(self, *, only_on_error: bool = False) -> Iterator[Snapshot]:
        """Restore the state at the end of the block, or only if the block raises; yields the snapshot."""
        before = self.snapshot(statistics=True)
        succeeded = False
        try:
            yield before
            succeeded = True
        finally:
            if not (succeeded and only_on_error):
                self.restore(before)


def _shared(entries: list[Any], known: tuple[Any, ...]) -> tuple[Any, ...]:
    return known if all(map(operator.is_, entries, known)) else tuple(entries)


def _copy(module: nn.Module, name: str, latest: BufferCopy | None, statistics: bool) -> BufferCopy | None:
    buffer = module._buffers[name]
    if buffer is None or (_is_write_only(module) and not statistics):
        return None
    if latest is not None and _is_current(module, name, latest):
        return latest
    return BufferCopy(buffer, buffer._version, buffer.detach().clone())


def _is_current(module: nn.Module, name: str, copy: BufferCopy) -> bool:
    buffer = module._buffers[name]
    return buffer is copy.tensor and buffer._version == copy.version and not _is_write_only(module)


def _is_write_only(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training  # Rule 2


def _devices_in_use(model: nn.Module) -> list[torch.device]:
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    devices.add(torch.device("cpu"))
    if torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(devices - {torch.device("meta")}, key=str)

"""What a second forward needs to be the first one again: random state, buffers, autocast.

Rules:
    1. A snapshot is taken before each chunk. What did not change since the last one is shared with it, so a model that
       draws nothing and writes no buffer costs one snapshot a group.
    2. Running statistics of normalisation layers in training are written, never read, by their forward: a replay needs
       none of them. (Their kernels do not count versions either.) They are put back after a replay all the same.
    3. Values are written back through `.data`, which leaves version counters alone: other graphs that saved the buffer
       find it as they left it.
"""

import operator
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradhooks.engine.random_state import RandomSource, sources_in_use


class BufferCopy(NamedTuple):
    """A buffer's tensor as it stood in its module, and what it held then."""

    tensor: Tensor
    version: int
    value: Tensor


class Snapshot(NamedTuple):
    """The state before a forward, in the order of a replay's sources and buffers."""

    random: tuple[Any, ...]
    buffers: tuple[BufferCopy | None, ...]


class ModelState:
    """Takes and restores the state around the forwards of one group.

    Args:
        model: The model whose buffers count.
        generators: Random sources beside the default generators of PyTorch.
    """

    def __init__(self, model: nn.Module, generators: Iterable[object] = ()) -> None:
        self._slots = [(module, name) for module in model.modules() for name in module._buffers.keys()]  # noqa: SIM118 - TorchScript's has no other
        devices = _devices_in_use(model)
        self._sources: list[RandomSource] = sources_in_use(devices, generators)
        kinds = sorted({device.type for device in devices})
        self._autocasts = [_autocast_state(kind) for kind in kinds if torch.amp.is_autocast_available(kind)]
        self._latest = Snapshot((None,) * len(self._sources), (None,) * len(self._slots))

    def take(self, *, statistics: bool = False) -> Snapshot:
        """The state now, as far as a later forward may depend on it; with `statistics`, all of it."""
        latest = self._latest
        random = _newer([source.newest(known) for source, known in zip(self._sources, latest.random)], latest.random)  # noqa: B905 - at every pose
        buffers = latest.buffers
        if self._slots:
            copies = [_copy(*slot, known, statistics) for slot, known in zip(self._slots, buffers)]  # noqa: B905
            buffers = _newer(copies, buffers)
        if random is not latest.random or buffers is not latest.buffers:
            self._latest = Snapshot(random, buffers)
        return self._latest

    def restore(self, snapshot: Snapshot) -> None:
        """Put random sources and buffers back to a snapshot."""
        for source, state in zip(self._sources, snapshot.random, strict=True):
            source.set(state)
        for (module, name), copy in zip(self._slots, snapshot.buffers, strict=True):
            if copy is not None:
                copy.tensor.data.copy_(copy.value)  # Rule 3
                module._buffers[name] = copy.tensor

    def is_at(self, snapshot: Snapshot) -> bool:
        """Whether nothing changed since a snapshot that was taken with statistics; False also where nobody can tell."""
        if any(source.newest(state) is not state for source, state in zip(self._sources, snapshot.random, strict=True)):
            return False
        return all(
            module._buffers[name] is None if copy is None else _is_at(module, name, copy)
            for (module, name), copy in zip(self._slots, snapshot.buffers, strict=True)
        )

    @contextmanager
    def undone(self, *, unless_it_succeeds: bool = False) -> Iterator[Snapshot]:
        """Put everything back at the end, to the snapshot that it gives, whatever happened in between."""
        before = self.take(statistics=True)
        succeeded = False
        try:
            yield before
            succeeded = True
        finally:
            if not (succeeded and unless_it_succeeds):
                self.restore(before)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast as it was when the group began. Backward threads have none of their own."""
        with ExitStack() as stack:
            for kind, enabled, dtype, cached in self._autocasts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            yield

    def no_autocast(self) -> AbstractContextManager[object]:
        """Plain arithmetic, as in a backward that the user calls outside autocast."""
        if not any(enabled for _, enabled, _, _ in self._autocasts):
            return nullcontext()
        stack = ExitStack()
        for kind, _, _, _ in self._autocasts:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    @property
    def autocast_dtypes(self) -> list[torch.dtype]:
        """What the forwards run under autocast to."""
        return [dtype for _, enabled, dtype, _ in self._autocasts if enabled]


def _newer(new: list[Any], known: tuple[Any, ...]) -> tuple[Any, ...]:
    return known if all(map(operator.is_, new, known)) else tuple(new)


def _copy(module: nn.Module, name: str, latest: BufferCopy | None, statistics: bool) -> BufferCopy | None:
    buffer = module._buffers[name]
    if buffer is None or (_written_only(module) and not statistics):
        return None
    if latest is not None and _is_at(module, name, latest):
        return latest
    return BufferCopy(buffer, buffer._version, buffer.detach().clone())


def _is_at(module: nn.Module, name: str, copy: BufferCopy) -> bool:
    buffer = module._buffers[name]
    return buffer is copy.tensor and buffer._version == copy.version and not _written_only(module)


def _written_only(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training  # Rule 2


def _devices_in_use(model: nn.Module) -> list[torch.device]:
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    devices.add(torch.device("cpu"))
    if torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(devices - {torch.device("meta")}, key=str)


def _autocast_state(kind: str) -> tuple[str, bool, torch.dtype, bool]:
    enabled = torch.is_autocast_enabled(kind)
    return kind, enabled, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()

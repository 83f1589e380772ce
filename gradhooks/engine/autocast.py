"""Autocast as it was in the forward: the backward runs without it, and in threads that have none of their own.

The default device (`torch.set_default_device`, `with torch.device(...)`) is one of a thread, too, and is kept here.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch


class _DeviceAutocast(NamedTuple):
    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool


def initialized_device_types() -> tuple[str, ...]:
    """Return the device types that this process uses so far: the CPU, CUDA, a backend that was registered."""
    registered = torch._C._get_privateuse1_backend_name()
    others = () if registered == "privateuseone" else (registered,)
    return ("cpu", "cuda", *others) if torch.cuda.is_initialized() else ("cpu", *others)


@functools.cache
def _with_autocast(device_types: tuple[str, ...]) -> list[str]:
    return [kind for kind in sorted(set(device_types)) if torch.amp.is_autocast_available(kind)]


class AutocastState:
    """The autocast settings at the time of construction.

    Args:
        device_types: The device types that the model uses.
    """

    def __init__(self, device_types: tuple[str, ...]) -> None:
        caches = torch.is_autocast_cache_enabled()
        self._settings = [
            _DeviceAutocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), caches)
            for kind in _with_autocast(device_types)
        ]
        self._default_device = torch.get_default_device()

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes to which the forward casts."""
        return [setting.dtype for setting in self._settings if setting.enabled]

    def restore(self) -> None:
        """Set autocast of this thread to these settings, outside any block."""
        for kind, enabled, dtype, _ in self._settings:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        for setting in self._settings[:1]:
            torch.set_autocast_cache_enabled(setting.cache_enabled)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run the block under these settings."""
        with ExitStack() as stack:
            for kind, enabled, dtype, cache_enabled in self._settings:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled))
            if torch.get_default_device() != self._default_device:
                stack.enter_context(self._default_device)
            yield

    def disabled(self) -> AbstractContextManager[object]:
        """Run the block without autocast, as a backward outside autocast does."""
        if not self.dtypes:
            return nullcontext()
        stack = ExitStack()
        for setting in self._settings:
            stack.enter_context(torch.autocast(setting.device_type, enabled=False))
        return stack

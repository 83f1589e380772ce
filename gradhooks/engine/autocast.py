"""Autocast as it was in the forward: the backward runs without it, and in threads that have none of their own.

The default device (`torch.set_default_device`, `with torch.device(...)`) is one of a thread, too, and is kept here.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch


class _DeviceAutocast(NamedTuple):
    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool


class AutocastState:
    """The autocast settings at the time of construction.

    Args:
        device_types: The device types that the model uses.
    """

    def __init__(self, device_types: Iterable[str]) -> None:
        self._settings = [
            _DeviceAutocast(
                kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
            )
            for kind in sorted(set(device_types))
            if torch.amp.is_autocast_available(kind)
        ]
        self._default_device = torch.get_default_device()

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes to which the forward casts."""
        return [setting.dtype for setting in self._settings if setting.enabled]

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

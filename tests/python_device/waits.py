"""Count the operations for which the host waits for the device."""

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ANSWERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""The host needs the result of these operators, or its shape: `item`, `equal`, `nonzero`, `bincount`."""


_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class WaitCount:
    """How often the host waited.

    Attributes:
        operators: By the name of the operator; copies are "copy to the host" and "copy from the host". A copy from the
            host waits unless it is asked for with `non_blocking=True`.
        copies_from_host: All copies from the host, by dtype, also those that do not wait.
        lines: By the operator and the innermost line of gradhooks, as `("item", "gradhooks/engine/drift.py:44")`.
    """

    operators: Counter[str] = field(default_factory=Counter)
    lines: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies_from_host: Counter[torch.dtype] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All waits."""
        return self.operators.total()

    def __str__(self) -> str:
        rows = [f"{count} x {name} in {line}" for (name, line), count in sorted(self.lines.items())]
        return "\n".join([f"{self.total} waits", *rows])

    def add(self, name: str) -> None:
        """Count one wait."""
        self.operators[name] += 1
        self.lines[name, _innermost_line()] += 1


_counts: list[WaitCount] = []
_MODES = ("default", "warn", "error")
_mode = "default"


def set_sync_debug_mode(mode: str) -> None:
    """Do at each wait what `torch.cuda.set_sync_debug_mode` does: nothing, warn, or raise an error."""
    global _mode  # noqa: PLW0603 - as in CUDA, it is one setting of the process
    if mode not in _MODES:
        raise RuntimeError(f"invalid value of sync_debug_mode {mode!r}, expected one of {', '.join(_MODES)}")
    _mode = mode


def get_sync_debug_mode() -> int:
    """Return the number of the mode, as `torch.cuda.get_sync_debug_mode` does."""
    return _MODES.index(_mode)


@contextmanager
def count_waits() -> Iterator[WaitCount]:
    """Count the waits in the block, those of a backward in it included."""
    count = WaitCount()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def note(name: str) -> None:
    """Note that the host waits."""
    for count in _counts:
        count.add(name)
    if _mode != "default":
        line = _innermost_line()
        message = f"called a synchronizing operation: {name} in {line}"
        if _mode == "error":
            raise RuntimeError(message)
        file, _, number = line.partition(":")
        warnings.warn_explicit(message, UserWarning, file, int(number or 0))


def note_operator(operator: Any, arguments: Sequence[Any]) -> None:
    """Note that the host waits, if it does for this operator."""
    if (not _counts and _mode == "default") or not _may_wait(operator):
        return
    name = operator.overloadpacket.__name__
    if name in _INDEXING:
        indices = [index for index in arguments[1] if index is not None]
        if any(index.device.type == "cpu" or index.dtype in {torch.bool, torch.uint8} for index in indices):
            note(f"{name} by a mask, or from the host")
    else:
        note(name.removeprefix("_"))


@functools.cache
def _may_wait(operator: Any) -> bool:
    name = operator.overloadpacket.__name__
    return name in _INDEXING or bool(_ANSWERS & set(operator.tags))


def note_copy(source: Tensor, target: Tensor, *, non_blocking: bool) -> None:
    """Note that the host waits for a copy, if it does."""
    if source.device.type == "cpu":
        for count in _counts:
            count.copies_from_host[source.dtype] += 1
    if target.device.type == "cpu":
        note("copy to the host")
    elif source.device.type == "cpu" and not non_blocking:
        note("copy from the host")


def _innermost_line() -> str:
    frame = sys._getframe(1)
    while frame is not None and "gradhooks" not in frame.f_globals.get("__name__", "").split("."):
        if frame.f_globals.get("__name__", "").startswith("gradhooks"):
            break
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "user code"
    return f"{frame.f_globals['__name__'].replace('.', '/')}.py:{frame.f_lineno}"

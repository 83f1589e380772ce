"""HiddenGenerators: random generators that no module holds: in closures, in globals, in other objects of the user."""

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import BuiltinMethodType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.random_state import RandomSource, generator_source, same_state

# Their own generators are known (`random_state.py`), and to walk through their code would take long.
_KNOWN_PACKAGES = {"torch", "numpy", "builtins", "random", "gradhooks", *sys.stdlib_module_names} - {"__main__"}
_MOST_OBJECTS = 10_000


class _Known(NamedTuple):
    """A generator, and its state at one time."""

    source: RandomSource
    state: Any


class HiddenGenerators:
    """The states of the generators that a forward may find.

    Args:
        model: The model.
        call: The option `call`.
    """

    def __init__(self, model: nn.Module, call: Any) -> None:
        sources = [generator_source(generator) for generator in _generators_in([model, call])]
        self._states = [_Known(source, source.get()) for source in sources if source is not None]

    def rewind(self) -> list[RandomSource]:
        """Put back the generators from which something was drawn, and return them."""
        moved = [known for known in self._states if not same_state(known.source.get(), known.state)]
        for known in moved:
            known.source.set(known.state)
        return [known.source for known in moved]


def _generators_in(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield the generators that are found from some objects, through attributes, containers, closures and globals."""
    seen: dict[int, object] = {}  # keeps the objects, so that no id is given twice
    pending = deque(roots)
    while pending and len(seen) < _MOST_OBJECTS:
        value = pending.popleft()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, Tensor)):
            continue
        seen[id(value)] = value
        if generator_source(value) is None:
            pending.extend(_parts(value))
        elif value is not torch.default_generator and type(value) is not random.SystemRandom:
            yield value


def _parts(value: Any) -> Iterable[Any]:
    """Return what can be reached from a value directly."""
    if isinstance(value, FunctionType):
        return _parts_of_function(value)
    if isinstance(value, (MethodType, BuiltinMethodType)):
        return [value.__self__, getattr(value, "__func__", None)]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
        return list(value.values() if isinstance(value, Mapping) else value)
    if isinstance(value, type):
        return [] if _is_known(value) else [part for part in vars(value).values() if isinstance(part, FunctionType)]
    has_own_parts = isinstance(value, nn.Module) or not _is_known(type(value))
    return [*(getattr(value, "__dict__", {}).values() if has_own_parts else ()), *type(value).__mro__]


def _parts_of_function(function: FunctionType) -> list[Any]:
    if _is_known(function):
        return []
    names = set(_names(function.__code__))
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # empty  # noqa: PERF203 - few
            continue
    return [*found, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_known(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _KNOWN_PACKAGES

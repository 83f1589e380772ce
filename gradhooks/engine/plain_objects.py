"""PlainObjects: objects of the user's own classes that modules hold: schedules, meters, averages, queues."""

import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_DEPTH = 3


class PlainObjects(nn.Module):
    """Stands for the objects that some modules hold, so that their attributes are recorded as those of a module.

    Objects of installed packages are left alone: they may belong to other threads, as loggers do.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        found = {id(part): part for module in modules for part in _parts_of(vars(module), _DEPTH)}
        self.objects = list(found.values())


def is_plain_object(value: Any) -> bool:
    """Return whether a value is an object of a class that is not installed, and has attributes."""
    return _is_own_class(type(value)) and hasattr(value, "__dict__")


def _is_own_class(kind: type) -> bool:
    if issubclass(kind, (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType)):
        return False
    source = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return kind.__module__ == "__main__" or (source is not None and not source.startswith(_INSTALLED))


def _parts_of(value: Any, depth: int) -> Iterator[Any]:
    if is_plain_object(value):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for part in list(value.values() if isinstance(value, Mapping) else value):
            yield from _parts_of(part, depth - 1)

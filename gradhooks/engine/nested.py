"""Find and replace the tensors inside a pose of any structure; copy its containers."""

import copy
import dataclasses
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

_LEAVES = (Tensor, str, int, float, bytes, type(None), nn.Module, type, FunctionType, ModuleType)


def tensors_in(value: Any, path: str = "pose") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in `value` with its path, such as `pose['atoms'][0]`.

    Mappings, lists, (named) tuples, dataclasses and the data objects of PyTorch Geometric are searched.
    """
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, part in _parts(value).items():
        yield from tensors_in(part, f"{path}[{key!r}]")


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor in `value`; return `value` itself if no tensor changes."""
    if isinstance(value, Tensor):
        return function(value)
    parts = dict(_parts(value))  # read once: a file may give a new object each time
    mapped = {key: map_tensors(function, part) for key, part in parts.items()}
    if all(mapped[key] is part for key, part in parts.items()):
        return value
    return _with_parts(value, mapped)


def independent_copy(inputs: Any) -> Any:
    """Return a copy of containers and tensors, which a model may change; tensors keep `requires_grad`, not graphs."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return fresh_containers(map_tensors(copied, inputs))


def fresh_containers(pose: Any) -> Any:
    """Return a copy of the containers of a pose that shares everything else, tensors above all.

    What a model writes into its pose (`pose["features"] = ...`, `data.h = ...`) then stays in the copy. Copied, at
    every level, are lists, mappings, sets, tuples of these, dataclasses, the data objects of PyTorch Geometric, objects
    that define `__copy__`, and objects of plain Python classes. A pose without them is returned as it is, and so is
    what refuses to be copied (open files, groups of HDF5).
    """
    if isinstance(pose, Tensor) or (type(pose) is tuple and all(isinstance(part, Tensor) for part in pose)):
        return pose
    return _fresh(pose, {})


def _fresh(value: Any, copies: dict[int, Any]) -> Any:
    """Return a copy of the containers in `value`; `copies` has those of the objects that were met, by their ids."""
    if isinstance(value, _LEAVES):
        return value
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, tuple):
        parts = [_fresh(part, copies) for part in value]
        return value if all(map(operator.is_, parts, value)) else _with_parts(value, dict(enumerate(parts)))
    fresh = _shallow_copy(value)
    copies[id(value)] = fresh
    if fresh is not value:
        for container, key, part in _places(fresh):
            inner = _fresh(part, copies)
            if inner is not part:
                container[key] = inner
    return fresh


def _shallow_copy(value: Any) -> Any:
    """Return a copy that shares all parts, or `value` itself if it is no container or cannot be copied."""
    kind = type(value)
    is_container = isinstance(value, (dict, list, MutableMapping, set, deque)) or _is_dataclass(value)
    if is_container or is_graph(value) or kind is SimpleNamespace or (hasattr(kind, "__copy__") and _has_dict(value)):
        try:
            return copy.copy(value)
        except Exception:  # what `__copy__` and `__reduce__` of any class raise
            return value
    make: object = kind.__new__
    if make is not object.__new__ or not _has_dict(value):
        return value
    try:
        fresh = object.__new__(kind)
    except TypeError:  # a type of C
        return value
    vars(fresh).update(vars(value))
    return fresh


class _Slots:
    """The attributes of an object without `__dict__`, frozen or not, written by name."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._owner, name, value)


def _places(container: Any) -> list[tuple[Any, Any, Any]]:
    """Return the parts of a container, each with the object and the key by which it can be replaced."""
    if isinstance(container, (list, deque)):
        return [(container, index, part) for index, part in enumerate(container)]
    if is_graph(container):
        return [(store, key, part) for store in container.stores for key, part in list(store.items())]
    parts = [(container, *item) for item in container.items()] if isinstance(container, MutableMapping) else []
    if not _has_dict(container):  # a dataclass with slots
        slots = dataclasses.fields(container) if _is_dataclass(container) else ()
        return [*parts, *((_Slots(container), slot.name, getattr(container, slot.name)) for slot in slots)]
    attributes = vars(container)
    return [*parts, *((attributes, *item) for item in list(attributes.items()))]


def _parts(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if _is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if is_graph(value):
        return {(number, key): part for number, store in enumerate(value.stores) for key, part in store.items()}
    return {}


def _with_parts(value: Any, parts: dict[Any, Any]) -> Any:
    if isinstance(value, tuple):
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    if isinstance(value, Mapping) and not hasattr(value, "__setitem__"):
        return parts
    rebuilt = copy.copy(value)
    for key, part in parts.items():
        if _is_dataclass(value):
            object.__setattr__(rebuilt, key, part)  # setattr fails on frozen dataclasses
        elif is_graph(value):
            rebuilt.stores[key[0]][key[1]] = part
        else:
            rebuilt[key] = part
    return rebuilt


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_graph(value: Any) -> bool:
    """Return whether a value is a data object of PyTorch Geometric, which is not a dependency.

    Attributes of an object may be anything, such as the columns of a table. Those of its class tell.
    """
    kind = type(value)
    return isinstance(getattr(kind, "stores", None), property) and callable(getattr(kind, "to_dict", None))


def _has_dict(value: Any) -> bool:
    return getattr(type(value), "__dictoffset__", 0) != 0

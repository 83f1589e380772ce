"""Find and replace the tensors inside a pose of any structure."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


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
    parts = _parts(value)
    mapped = {key: map_tensors(function, part) for key, part in parts.items()}
    if all(mapped[key] is part for key, part in parts.items()):
        return value
    return _with_parts(value, mapped)


def _parts(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if _is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if _is_graph(value):
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
        elif _is_graph(value):
            rebuilt.stores[key[0]][key[1]] = part
        else:
            rebuilt[key] = part
    return rebuilt


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_graph(value: Any) -> bool:
    # PyTorch Geometric is not a dependency, so its data objects are recognized by their attributes.
    return hasattr(value, "stores") and hasattr(value, "to_dict")

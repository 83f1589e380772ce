"""Tensors inside whatever a pose is made of."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any, path: str = "pose") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in `value` with its path, as `pose['atoms'][0]`.

    Looks into mappings, lists, (named) tuples, dataclasses and PyTorch Geometric's data objects.
    """
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, part in _parts(value).items():
        yield from tensors_in(part, f"{path}[{key!r}]")


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `change` to every tensor in `value`; the very same object comes back where nothing changed."""
    if isinstance(value, Tensor):
        return change(value)
    parts = _parts(value)
    changed = {key: map_tensors(change, part) for key, part in parts.items()}
    if all(changed[key] is part for key, part in parts.items()):
        return value
    return _with_parts(value, changed)


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
            object.__setattr__(rebuilt, key, part)  # a frozen dataclass refuses the ordinary way
        elif _is_graph(value):
            rebuilt.stores[key[0]][key[1]] = part
        else:
            rebuilt[key] = part
    return rebuilt


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_graph(value: Any) -> bool:
    # PyTorch Geometric is no dependency: its data objects are known by what they offer.
    return hasattr(value, "stores") and hasattr(value, "to_dict")

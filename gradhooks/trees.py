"""Tensors inside whatever a pose is made of."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `change` to every tensor in `value`; the very same object comes back where nothing changed.

    Looks into mappings, lists, (named) tuples, dataclasses and PyTorch Geometric's data objects.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _rebuilt(value, value, change, _with_items)
    if isinstance(value, (list, tuple)):
        return _rebuilt(value, dict(enumerate(value)), change, _with_elements)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _rebuilt(value, fields, change, _with_fields)
    if _is_graph(value):
        stores = {index: dict(store.items()) for index, store in enumerate(value.stores)}
        return _rebuilt(value, stores, change, _with_stores)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in `value`, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def _rebuilt(value: Any, parts: Mapping[Any, Any], change: Callable[[Tensor], Tensor], with_parts: Any) -> Any:
    changed = {key: map_tensors(change, part) for key, part in parts.items()}
    if all(changed[key] is part for key, part in parts.items()):
        return value
    return with_parts(value, changed)


def _with_items(value: Any, items: dict[Any, Any]) -> Any:
    if not hasattr(value, "__setitem__"):
        return items
    rebuilt = copy.copy(value)
    for key, item in items.items():
        rebuilt[key] = item
    return rebuilt


def _with_elements(value: Any, elements: dict[int, Any]) -> Any:
    values = list(elements.values())
    return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)


def _with_fields(value: Any, fields: dict[str, Any]) -> Any:
    rebuilt = copy.copy(value)
    for name, field in fields.items():
        object.__setattr__(rebuilt, name, field)  # a frozen dataclass refuses the ordinary way
    return rebuilt


def _is_graph(value: Any) -> bool:
    # PyTorch Geometric is no dependency: its data objects are known by what they offer.
    return hasattr(value, "stores") and hasattr(value, "to_dict")


def _with_stores(value: Any, stores: dict[int, dict[str, Any]]) -> Any:
    rebuilt = copy.copy(value)
    for index, items in stores.items():
        for key, item in items.items():
            rebuilt.stores[index][key] = item
    return rebuilt

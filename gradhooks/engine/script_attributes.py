"""Attributes of TorchScript modules, whose values live in C++ and come out as copies."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MACHINERY = {"training", "_is_full_backward_hook"}


class ScriptRecord(NamedTuple):
    """The attributes of a TorchScript module at one time."""

    module: torch.jit.ScriptModule
    values: dict[str, Any]

    def restore(self) -> None:
        """Set all attributes."""
        for name, value in self.values.items():
            self.module._c.setattr(name, value)


def record_script_attributes(
    module: torch.jit.ScriptModule, known: ScriptRecord | None, add_tensor: Callable[[Tensor], None]
) -> ScriptRecord | None:
    """Return the attributes of now, or `known` if they are the same; None if there are none.

    Args:
        module: The module.
        known: The latest record.
        add_tensor: Gets the tensors among the values.
    """
    if not hasattr(module, "_concrete_type"):  # frozen: its attributes are constants
        return None
    other = {*_MACHINERY, *module._parameters.keys()}
    names = [name for name in module._concrete_type.get_attributes() if name not in other]
    if not names:
        return None
    values = {name: getattr(module, name) for name in names}
    for value in values.values():
        if isinstance(value, Tensor):
            add_tensor(value)
    return known if known is not None and _same(known.values, values) else ScriptRecord(module, values)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    try:
        return all(value is other[name] or bool(value == other[name]) for name, value in one.items())
    except Exception:  # tensors, objects of C++
        return False

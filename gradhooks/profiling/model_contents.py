"""All that a model holds, by name, as values that can be compared. Independent of the engine's own snapshots."""

import random
import sys
from collections.abc import Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradhooks.engine.module_attributes import MACHINERY
from gradhooks.random_state import generator_source

_OPAQUE = (type, ModuleType, FunctionType, MethodType, torch.dtype, torch.device, torch.Size)
_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_DEPTH = 8  # objects in objects; a module that holds its trainer holds the world


class TensorContent(NamedTuple):
    """A tensor's values, and whether it belongs to a graph."""

    value: Tensor
    has_graph: bool


def read_contents(model: nn.Module) -> dict[str, Any]:
    """Return parameters, buffers, attributes of modules and of objects in them, and random states, by name.

    Values are numbers, strings, `TensorContent`, states of generators, and the names of the types of other objects.
    """
    reader = _Reader()
    reader.read_module("", model)
    return {**reader.values, **global_random_states()}


def global_random_states() -> dict[str, Any]:
    """Return the states of the global generators of PyTorch (on the CPU and the devices in use), numpy and Python."""
    states: dict[str, Any] = {
        "the generator of torch": torch.get_rng_state().tolist(),
        "the generator of random": random.getstate(),
    }
    if "numpy.random" in sys.modules:
        states["the generator of numpy.random"] = plain_value(sys.modules["numpy.random"].get_state(legacy=False))
    if torch.cuda.is_initialized():
        states["the generators of CUDA"] = [state.tolist() for state in torch.cuda.get_rng_state_all()]
    return states


class _Reader:
    """Walks through modules and what they hold, and reads each object once."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._seen: dict[int, object] = {}  # keeps the objects, so that no id is given twice

    def read_module(self, path: str, module: nn.Module) -> None:
        """Read the module with the given path, and the modules below it."""
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        self._read_registered(f"{path}." if path else "", module)
        attributes = {name: value for name, value in vars(module).items() if name not in MACHINERY}
        if isinstance(module, torch.jit.ScriptModule):
            attributes = _script_attributes(module)
        computed = {getattr(hook, "name", None) for hook in module._forward_pre_hooks.values()}  # as weight_norm does
        for name, value in attributes.items():
            if name not in computed:
                self._read(f"{path}.{name}" if path else name, value, 0)

    def _read_registered(self, prefix: str, module: nn.Module) -> None:
        for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, tensor in table.items():
                self._seen[id(tensor)] = tensor
                self.values[f"{kind} {prefix}{name}"] = None if tensor is None else _content(tensor)
        for name, child in module._modules.items():
            if child is not None:
                self.read_module(f"{prefix}{name}", child)

    def _read(self, path: str, value: Any, depth: int) -> None:
        name = f"attribute {path}"
        if isinstance(value, _NUMBERS):
            self.values[name] = value
            return
        if isinstance(value, Tensor) and isinstance(value, nn.Parameter) and id(value) in self._seen:
            return
        if isinstance(value, _OPAQUE) or id(value) in self._seen or depth > _DEPTH:
            self.values[name] = type(value).__name__
            return
        if isinstance(value, nn.Module):
            self.read_module(path, value)
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.values[name] = _content(value)
        elif (source := generator_source(value)) is not None:
            self.values[f"the generator {path}"] = plain_value(source.get())
        else:
            self._read_object(path, name, value, depth)

    def _read_object(self, path: str, name: str, value: Any, depth: int) -> None:
        self.values[name] = type(value).__name__
        if _is_array(value):
            self.values[name] = plain_value(value)
        elif isinstance(value, (dict, Mapping)):
            self.values[f"{name} (its keys)"] = sorted(map(str, value))
            for key, part in list(value.items()):
                self._read(f"{path}[{key!r}]", part, depth + 1)
        elif isinstance(value, (set, frozenset)):
            self.values[name] = sorted(map(str, value))
        elif hasattr(value, "__len__") and hasattr(value, "__iter__") and _is_sequence(value):
            self.values[f"{name} (its length)"] = len(value)
            for index, part in enumerate(list(value)):
                self._read(f"{path}[{index}]", part, depth + 1)
        for key, part in list(getattr(value, "__dict__", {}).items()):
            self._read(f"{path}.{key}", part, depth + 1)


def _script_attributes(module: torch.jit.ScriptModule) -> dict[str, Any]:
    if not hasattr(module, "_concrete_type"):  # frozen: its attributes are constants
        return {}
    parameters = set(module._parameters.keys())  # a view of C++ without `in`
    return {name: getattr(module, name) for name in module._concrete_type.get_attributes() if name not in parameters}


def _content(tensor: Tensor) -> TensorContent | str:
    if is_lazy(tensor) or tensor.is_meta:
        return type(tensor).__name__
    return TensorContent(tensor.detach().clone(), tensor.grad_fn is not None)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or type(value).__name__ == "deque"


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def plain_value(value: Any) -> Any:
    """Return a state of a generator, or an array, as numbers, strings and containers of them."""
    if isinstance(value, Mapping):
        return {key: plain_value(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain_value, value))
    return value.tolist() if hasattr(value, "tolist") else value

"""Describe all that a model holds by values, without the library: for comparisons of models that ran."""

import dataclasses
import random
from collections import deque
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_MACHINERY = set(vars(nn.Module())) - {"training"}


def contents(model: nn.Module) -> dict[str, Any]:
    """Return parameters, buffers, attributes and global generators by name, as values that `==` compares."""
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": describe(np.random.get_state(legacy=False)),  # noqa: NPY002
        "torch": describe(torch.get_rng_state()),
    }
    for path, module in model.named_modules():
        tables = [("parameter", module._parameters.items()), ("buffer", module._buffers.items())]
        found.update((f"{path} {kind} {name}", describe(value)) for kind, table in tables for name, value in table)
        found[f"{path} names"] = [[name for name, _ in table] for _, table in tables]
        if isinstance(module, torch.jit.ScriptModule):
            names = module._concrete_type.get_attributes()
            found.update((f"{path} {name}", describe(getattr(module, name))) for name in names)
        else:
            attributes = {name: value for name, value in vars(module).items() if name not in _MACHINERY}
            found[f"{path} attributes"] = describe(attributes)
            found[f"{path} not saved"] = sorted(module._non_persistent_buffers_set)
    return found


def describe(value: Any, above: tuple[int, ...] = ()) -> Any:  # noqa: PLR0911 - one for each kind
    """Return a value as nested lists and strings."""
    if id(value) in above:
        return "cycle"
    above = (*above, id(value))
    if is_lazy(value):
        return "lazy"
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), repr(value.detach().tolist())]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), repr(value.tolist())]
    if isinstance(value, Mapping):
        return [type(value).__name__, [[repr(key), describe(part, above)] for key, part in value.items()]]
    if isinstance(value, (list, tuple, deque)):
        return [type(value).__name__, [describe(part, above) for part in value]]
    if isinstance(value, set):
        return sorted(map(repr, value))
    if (dataclasses.is_dataclass(value) or isinstance(value, SimpleNamespace)) and hasattr(value, "__dict__"):
        return describe(vars(value), above)
    if isinstance(value, nn.Module):
        return describe(value.state_dict(), above)
    return _generator_state(value)


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return describe(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return describe(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return describe(value.get_state(legacy=False))
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def seed_everything(seed: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)

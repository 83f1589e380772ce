"""What messages call tensors that a model holds, and that are no parameters."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gradhooks.engine.module_attributes import MACHINERY
from gradhooks.engine.module_watch import modules_in_use

_DEPTH = 4


def tensors_of_modules(model: nn.Module) -> dict[int, str]:
    """Return what messages call the buffers and attributes of modules: `"buffer codebook: "`, by the tensors' ids."""
    return {key: f"{kind} {path}: " for key, (kind, path) in places_of_tensors(model).items()}


def places_of_tensors(model: nn.Module) -> dict[int, tuple[str, str]]:
    """Return "buffer" or "attribute" and the path of each tensor that modules hold, by the tensors' ids.

    Containers and objects in attributes are searched to a certain depth: `cache['keys'][0]`, `helper.mean`.
    """
    found: dict[int, tuple[str, str]] = {}
    for path, module in modules_in_use(model).items():
        prefix = f"{path}." if path else ""
        for kind, values in (("buffer", module._buffers), ("attribute", vars(module))):
            for name, value in values.items():
                for inner, tensor in () if name in MACHINERY else _tensors(f"{prefix}{name}", value, _DEPTH):
                    found.setdefault(id(tensor), (kind, inner))
    return found


def _tensors(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif depth and not isinstance(value, nn.Module):
        for inner, part in _parts(value):
            yield from _tensors(path + inner, part, depth - 1)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{number}]", part) for number, part in enumerate(value)]
    if hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        return [(f".{name}", part) for name, part in vars(value).items()]
    return []

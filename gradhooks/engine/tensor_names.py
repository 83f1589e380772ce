"""What messages call tensors that a model holds, and that are no parameters."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gradhooks.engine.module_attributes import MACHINERY
from gradhooks.engine.module_watch import modules_in_use


def tensors_of_modules(model: nn.Module) -> dict[int, str]:
    """Return what messages call the buffers and attributes of modules: `"buffer codebook: "`, by the tensors' ids."""
    found: dict[int, str] = {}
    for path, module in modules_in_use(model).items():
        for kind, values in (("buffer", module._buffers), ("attribute", vars(module))):
            for name, value in values.items():
                if isinstance(value, (Tensor, list, tuple, dict)) and name not in MACHINERY:
                    held = {"": value} if isinstance(value, Tensor) else dict(_items(value))
                    for key, part in held.items():
                        found.setdefault(id(part), f"{kind} {f'{path}.{name}'.lstrip('.')}{key}: ")
    return found


def _items(container: Any) -> Iterator[tuple[str, Any]]:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    return ((f"[{key!r}]", part) for key, part in items if isinstance(part, Tensor))

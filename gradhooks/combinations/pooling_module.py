"""How a pooling module from elsewhere is called: what its signature says, and what its output contains."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradhooks.errors import CombinationError

MASK_NAMES = ("src_key_padding_mask", "key_padding_mask", "padding_mask", "attention_mask", "mask")
"""Names under which modules take a mask of the instances, the most specific first."""


class ModuleOutput(NamedTuple):
    """What a pooling module returned.

    Attributes:
        result: The combined prediction, shape `(B, ...)`.
        others: The other tensors, in their order.
    """

    result: Tensor
    others: list[Tensor]


class CallArguments(NamedTuple):
    """The keyword arguments of the user's call.

    Attributes:
        values: The arguments.
        names: Which of them have a row per pose.
    """

    values: Mapping[str, Any]
    names: Collection[str]

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> "CallArguments":
        """Apply a function to the arguments that have a row per pose."""
        values = {name: function(value) if name in self.names else value for name, value in self.values.items()}
        return CallArguments(values, self.names)


def takes_group_index(module: nn.Module) -> bool:
    """Return whether a module takes all groups at once, as the aggregations of PyTorch Geometric do."""
    names = _argument_names(module)
    return "index" in names and "dim_size" in names


def mask_argument(module: nn.Module, requested: str | None) -> str | None:
    """Return the name of the argument that takes the mask of the instances, or None if there is none.

    Args:
        module: The pooling module.
        requested: A name, None for no mask, or "auto", which looks for one of `MASK_NAMES`.

    Raises:
        CombinationError: The module has no argument of that name.
    """
    names = _argument_names(module)
    if requested == "auto":
        return next((name for name in MASK_NAMES if name in names), None)
    if requested is not None and requested not in names and "**" not in names:
        raise CombinationError(
            f"Pooling: {type(module).__name__}.forward has no argument {requested!r} for the mask; it takes "
            f"{', '.join(sorted(names))}"
        )
    return requested


def marks_padding(name: str) -> bool:
    """Return whether a mask of this name is true where there is no instance, as those of PyTorch's own modules are."""
    return "padding" in name


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of the parameters of a module, or None if it has none."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def separate(output: Any, result: str | int | None, name: str) -> ModuleOutput:
    """Separate the combined prediction from what a module returned beside it.

    Args:
        output: What the module returned.
        result: Which item of a tuple or mapping is the combined prediction; None is the first item of a tuple.
        name: The name of the module, for messages.

    Raises:
        CombinationError: The output has no such item, or it is no tensor.
    """
    if isinstance(output, Tensor):
        return ModuleOutput(output, [])
    is_mapping = isinstance(output, Mapping)
    items = dict(output) if is_mapping else dict(enumerate(output)) if isinstance(output, (tuple, list)) else {}
    key = 0 if result is None and not is_mapping else result
    if not isinstance(items.get(key), Tensor):
        available = ", ".join(map(repr, items)) or type(output).__name__
        raise CombinationError(
            f"Pooling: {name} returned {available}, of which {key!r} is no tensor; choose the combined prediction with "
            "Pooling(module, result=...)"
        )
    others = [value for other, value in items.items() if other != key]
    return ModuleOutput(items[key], [leaf for leaf in tree_leaves(others) if isinstance(leaf, Tensor)])


def _argument_names(module: nn.Module) -> set[str]:
    module = getattr(module, "_orig_mod", module)  # the forward of a compiled module takes anything
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # written in C, or TorchScript
        return set()
    return {"**" if each.kind is each.VAR_KEYWORD else each.name for each in parameters}

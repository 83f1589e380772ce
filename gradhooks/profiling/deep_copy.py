"""Deep copies of models and poses, in float64."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradhooks.engine.module_attributes import MACHINERY
from gradhooks.engine.nested import tensors_in

_WIDE = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}
_WIDE[torch.complex64] = torch.complex128


def deep_copy(value: Any, memo: dict[int, Any], what: str) -> Any:
    """Return a deep copy.

    Args:
        value: What to copy.
        memo: The copies by the ids of the originals; gets new ones.
        what: What it is called in the message.

    Raises:
        TypeError: It cannot be copied. Of a model, the message names the attribute.
    """
    if isinstance(value, nn.Module):
        memo.update((id(tensor), tensor.detach().clone()) for tensor in tensors_with_graph(value))
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        part = _part_that_fails(value) if isinstance(value, nn.Module) else ""
        raise TypeError(
            f"gradcheck compares copies of {what}, and copy.deepcopy fails{part} ({type(error).__name__}: {error}). "
            "Define __deepcopy__ for what cannot be copied, or pass it as it is before its first forward: tensors "
            "with a graph cannot be copied"
        ) from error


def _part_that_fails(model: nn.Module) -> str:
    """Return which attribute of which module cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return f" at its attribute {f'{path}.{name}'.lstrip('.')}"
    return ""


def tensors_with_graph(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors in attributes of modules that have a graph, as `weight_norm` leaves them: copied without it."""
    for module in model.modules():
        attributes = {name: value for name, value in vars(module).items() if name not in MACHINERY}
        yield from (tensor for _, tensor in tensors_in(attributes) if tensor.grad_fn is not None)


def is_uninitialized(model: nn.Module) -> bool:
    """Return whether a lazy module of the model has not run yet."""
    return any(map(is_lazy, (*model.parameters(), *model.buffers())))


def make_leaves(model: nn.Module, copied: nn.Module) -> None:
    """Cut the graphs that `copy.deepcopy` leaves between the parameters of a TorchScript module and their copies."""
    for (_, leaf), (_, parameter) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        if not parameter.is_leaf:
            parameter.detach_().requires_grad_(leaf.requires_grad)


def widen(tensors: Iterable[Tensor]) -> None:
    """Convert to float64 in place, so that every reference to a tensor sees it."""
    for tensor in tensors:
        if tensor.dtype in _WIDE and not (is_lazy(tensor) or tensor.is_inference() or tensor.is_meta):
            tensor.data = tensor.data.to(_WIDE[tensor.dtype])

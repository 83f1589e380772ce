"""Arguments of a combination that have a row per pose: find them, move them to a device, take rows of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def row_arguments(arguments: Mapping[str, Any], count: int) -> set[str]:
    """Return the names of the arguments that have a row per pose: tensors with `count` rows."""
    return {
        name
        for name, argument in arguments.items()
        if isinstance(argument, Tensor) and argument.dim() > 0 and len(argument) == count
    }


def rows_on_device(arguments: Mapping[str, Any], count: int, device: torch.device) -> dict[str, Any]:
    """Return the arguments with those that have a row per pose on a device, except those that require grad."""
    names = row_arguments(arguments, count)
    return {
        name: argument.to(device, non_blocking=True) if name in names and not argument.requires_grad else argument
        for name, argument in arguments.items()
    }


def rows_of_arguments(arguments: Mapping[str, Any], count: int, selected: Tensor | slice) -> dict[str, Any]:
    """Return the arguments with some rows of those that have `count` rows."""
    names = row_arguments(arguments, count)
    return {name: rows_of(argument, selected) if name in names else argument for name, argument in arguments.items()}


def rows_of(tensor: Tensor, selected: Tensor | slice) -> Tensor:
    """Return some rows of a tensor, of any device; the indices, shape `(n,)`, are on the CPU."""
    if isinstance(selected, slice):
        return tensor[selected]
    return tensor[selected.to(tensor.device, non_blocking=True)]

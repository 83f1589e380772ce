"""Compare a model's structure and values before and after."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOK_ATTRIBUTES = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
]


def module_structure(model: nn.Module) -> dict[str, Any]:
    """Return everything but values: attributes, the identity of parameters, flags, numbers of hooks, keys."""
    structure: dict[str, Any] = {"state_dict": list(model.state_dict())}
    for path, module in model.named_modules():
        structure[f"{path}: attributes"] = sorted(vars(module))
        structure[f"{path}: training"] = module.training
        structure[f"{path}: parameters"] = [(name, id(value)) for name, value in module._parameters.items()]
        structure[f"{path}: buffers"] = list(module._buffers.keys())
        structure[f"{path}: hooks"] = {name: len(getattr(module, name, ())) for name in HOOK_ATTRIBUTES}
        if isinstance(module, nn.RNNBase):
            structure[f"{path}: flat weights"] = [id(weight) for weight in module._flat_weights]
    for name, parameter in model.named_parameters():
        structure[f"{name}: hooks"] = hook_counts(parameter)
        structure[f"{name}: flags"] = (parameter.requires_grad, type(parameter), sorted(vars(parameter)))
        structure[f"{name}: version"] = parameter._version
    return structure


def hook_counts(leaf: Tensor) -> tuple[int, int]:
    return len(leaf._backward_hooks or ()), len(leaf._post_accumulate_grad_hooks or ())


def tensor_values(model: nn.Module) -> dict[str, Tensor | None]:
    """Return copies of parameters, gradients, buffers and the global random state."""
    values: dict[str, Tensor | None] = {"random state": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        values[name] = parameter.detach().clone()
        values[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
    values.update({name: buffer.clone() for name, buffer in model.named_buffers()})
    return values


def changed_names(before: dict[str, Tensor | None], after: dict[str, Tensor | None]) -> list[str]:
    return [name for name, value in before.items() if not _equal(value, after.get(name))] + [
        name for name in after if name not in before
    ]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    one, other = (tensor.to_dense() if tensor.is_sparse else tensor for tensor in (one, other))
    return torch.equal(one, other)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block changes neither the model, nor its gradients, nor the global random state."""
    structure, values = module_structure(model), tensor_values(model)
    yield
    assert module_structure(model) == structure
    assert changed_names(values, tensor_values(model)) == []


@contextmanager
def structure_unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block changes values only."""
    structure = module_structure(model)
    yield
    assert module_structure(model) == structure

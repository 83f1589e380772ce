"""What must be as it was."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict

KEYS_ARE_ASKED_FOR = pytest.mark.skipif(
    "dsd_fqn_modifiers" not in inspect.signature(state_dict._get_fqns).parameters,
    reason="distributed checkpoints of this torch do not ask modules for the keys that their hooks change",
)
HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
]


def structure(model: nn.Module) -> dict[str, Any]:
    """All but numbers: which objects stand where, flags, hooks, keys."""
    seen: dict[str, Any] = {"state_dict": list(model.state_dict())}
    for path, module in model.named_modules():
        seen[f"{path}: attributes"] = sorted(vars(module))
        seen[f"{path}: training"] = module.training
        seen[f"{path}: parameters"] = [(name, id(value)) for name, value in module._parameters.items()]
        seen[f"{path}: buffers"] = list(module._buffers.keys())
        seen[f"{path}: hooks"] = {name: len(getattr(module, name, ())) for name in HOOKS}
        if isinstance(module, nn.RNNBase):
            seen[f"{path}: flat weights"] = [id(weight) for weight in module._flat_weights]
    for name, parameter in model.named_parameters():
        seen[f"{name}: hooks"] = hooks_of(parameter)
        seen[f"{name}: flags"] = (parameter.requires_grad, type(parameter), sorted(vars(parameter)))
        seen[f"{name}: version"] = parameter._version
    return seen


def hooks_of(leaf: Tensor) -> tuple[int, int]:
    return len(leaf._backward_hooks or ()), len(leaf._post_accumulate_grad_hooks or ())


def numbers(model: nn.Module) -> dict[str, Tensor | None]:
    """The values of parameters, gradients, buffers, and the global random state."""
    held: dict[str, Tensor | None] = {"random state": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        held[name] = parameter.detach().clone()
        held[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
    held.update({name: buffer.clone() for name, buffer in model.named_buffers()})
    return held


def differing(before: dict[str, Tensor | None], after: dict[str, Tensor | None]) -> list[str]:
    return [name for name, value in before.items() if not _same(value, after.get(name))] + [
        name for name in after if name not in before
    ]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    one, other = (tensor.to_dense() if tensor.is_sparse else tensor for tensor in (one, other))
    return torch.equal(one, other)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside leaves the model, its gradients and the random state as they were."""
    before, held = structure(model), numbers(model)
    yield
    assert structure(model) == before
    assert differing(held, numbers(model)) == []


@contextmanager
def same_structure(model: nn.Module) -> Iterator[None]:
    """What happens inside may change numbers alone."""
    before = structure(model)
    yield
    assert structure(model) == before

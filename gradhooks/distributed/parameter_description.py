"""Describe parameters by strings and numbers that are the same in every process."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_BLOCK = 2**20
_STEP = 0x1E3779B97F4A7C15
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Named = Sequence[tuple[str, Tensor]]


def describe_parameter(name: str, parameter: Tensor) -> tuple[str, str]:
    """Return the name of a parameter for messages, with its shape, dtype and whether it is trained."""
    shape = "no shape yet" if is_lazy(parameter) else f"shape {tuple(parameter.shape)}"
    return f"parameter {name!r}", f"{shape}, {parameter.dtype}, {'trainable' if parameter.requires_grad else 'frozen'}"


def describe_values(named: Named) -> dict[str, str]:
    """Return hash and norm of each parameter, by its name for messages."""
    hashes = value_hashes(named)
    sizes = {name: f", norm {float(each.detach().float().norm()):.6g}" for name, each in named if _is_float(each)}
    return {
        f"the values of parameter {name!r}": f"hash {value:016x}{sizes.get(name, '')}" for name, value in hashes.items()
    }


def value_hashes(named: Named) -> dict[str, int]:
    """Return a hash of the bits of each parameter that has values. Waits for each device once."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, parameter in named:
        if has_values(parameter):
            by_device.setdefault(parameter.device, {})[name] = parameter.detach()
    hashes = {}
    for device, tensors in by_device.items():
        factors = torch.arange(_BLOCK, device=device).mul_(_STEP)
        factors.bitwise_xor_(factors >> 32).bitwise_or_(1)  # not linear, so that swaps do not cancel out
        values = torch.stack([_hash(tensor, factors) for tensor in tensors.values()]).tolist()
        hashes.update({name: value % 2**64 for name, value in zip(tensors, values, strict=True)})
    return {name: hashes[name] for name, _ in named if name in hashes}


def _hash(tensor: Tensor, factors: Tensor) -> Tensor:
    """Return a sum of the elements' bits, each multiplied by a factor of its own, shape `()`, int64."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block in flat.view(_INTEGERS[flat.element_size()]).split(_BLOCK):
        total.mul_(_STEP).add_((factors[: len(block)] * block).sum())
    return total


def trained_numbers(named: Named) -> list[Tensor]:
    """Return the trainable parameters of which a norm can be taken."""
    return [each for _, each in named if each.requires_grad and _is_float(each)]


def norms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the norm of each tensor, -1 for NaN, -2 for infinity. Waits once for each device."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    found: list[float] = []
    for group in by_kind.values():
        values = torch.stack(list(torch._foreach_norm(group))).double()
        found += values.nan_to_num(nan=-1.0, posinf=-2.0).tolist()
    return found


def _is_float(parameter: Tensor) -> bool:
    return has_values(parameter) and (parameter.is_floating_point() or parameter.is_complex())


def has_values(parameter: Tensor) -> bool:
    """Return whether the elements of a parameter can be read: it is neither lazy nor a tensor of another kind."""
    if is_lazy(parameter) or type(parameter) not in {nn.Parameter, Tensor} or parameter.is_quantized:
        return False
    return parameter.layout == torch.strided and parameter.device.type != "meta"

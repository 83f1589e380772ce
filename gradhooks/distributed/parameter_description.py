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
    sums: dict[torch.device, dict[str, Tensor]] = {}
    for name, parameter in named:
        if has_values(parameter):
            sums.setdefault(parameter.device, {})[name] = _hash(parameter.detach())
    hashes = {}
    for on_device in sums.values():
        values = torch.stack(list(on_device.values())).tolist()
        hashes.update({name: value % 2**64 for name, value in zip(on_device, values, strict=True)})
    return {name: hashes[name] for name, _ in named if name in hashes}


def _hash(tensor: Tensor) -> Tensor:
    """Return a sum of the elements' bits, each multiplied by an odd number of its own, shape `()`, int64."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, block in enumerate(bits.split(_BLOCK)):
        first = number * _BLOCK
        factors = torch.arange(first, first + len(block), device=tensor.device).mul_(_STEP)
        factors.bitwise_xor_(factors >> 32).bitwise_or_(1)  # not linear, so that swaps do not cancel out
        total += (factors * block).sum()
    return total


def norms(named: Named) -> list[float]:
    """Return the norm of each trainable parameter. Waits for each device once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, parameter in named:
        if parameter.requires_grad and _is_float(parameter):
            by_device.setdefault(parameter.device, []).append(parameter.detach())
    found: list[float] = []
    for tensors in by_device.values():
        found += torch.stack([norm.double() for norm in torch._foreach_norm(tensors)]).nan_to_num(-1.0).tolist()
    return found


def _is_float(parameter: Tensor) -> bool:
    return has_values(parameter) and (parameter.is_floating_point() or parameter.is_complex())


def has_values(parameter: Tensor) -> bool:
    """Return whether the elements of a parameter can be read: it is neither lazy nor a tensor of another kind."""
    if is_lazy(parameter) or type(parameter) not in {nn.Parameter, Tensor} or parameter.is_quantized:
        return False
    return parameter.layout == torch.strided and parameter.device.type != "meta"

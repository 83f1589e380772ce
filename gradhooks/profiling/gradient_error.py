"""Measure how far tensors are from those that are expected: the one measure of `gradcheck` and of `compare`."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor | None]


def gradient_error(gradients: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the largest error of a gradient, see `gradient_errors`; 0 without any."""
    names = list(map(str, range(len(expected))))
    errors = gradient_errors(dict(zip(names, gradients, strict=True)), dict(zip(names, expected, strict=True)))
    return max(errors.values(), default=0.0)


def gradient_errors(
    gradients: Gradients, expected: Gradients, *, allowances: Mapping[str, float] | None = None, allowed: float = 1.0
) -> dict[str, float]:
    """Return the norm of the difference of each gradient, relative to the norm of the expected one.

    What divides it is at least a part of the largest norm of the model, `floor_of` its dtype: a gradient that is as
    small is a difference of larger numbers, of which only the rounding errors are left. The error is infinite if one of
    a pair is missing, or only one of them is finite; a pair that is missing has none.

    Args:
        gradients: The gradients, by name.
        expected: Those of the full graph, by name.
        allowances: Differences that are no more than rounding, by name; see `Precision`.
        allowed: The error that such a difference has.
    """
    norms = {name: norm_of(value) for name, value in expected.items() if value is not None}
    largest = max((norm for norm in norms.values() if norm < math.inf), default=0.0)
    errors = {}
    for name, reference in expected.items():
        actual = gradients.get(name)
        if reference is None or actual is None:
            if reference is not actual:
                errors[name] = math.inf
            continue
        size = max(norms[name], floor_of(reference.dtype) * largest)
        if allowances is not None:
            size = max(size, allowances.get(name, 0.0) / allowed)
        errors[name] = difference_of(actual, reference) / (size or 1.0)
    return errors


def floor_of(dtype: torch.dtype) -> float:
    """Return which part of the largest norm is the least size of a gradient: 1e-4 in float64, 2e-2 in float32."""
    return float(torch.finfo(dtype).eps ** 0.25)


def norm_of(tensor: Tensor) -> float:
    """Return the norm of a tensor, dense or sparse; infinite if an entry is not finite."""
    norm = torch.linalg.vector_norm(_dense(tensor)).item()
    return norm if math.isfinite(norm) else math.inf


def difference_of(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference of two tensors; infinite if shapes, or what is not finite, differ."""
    if actual.shape != expected.shape:
        return math.inf
    one, other = _dense(actual), _dense(expected)
    same = (one == other) | (one.isnan() & other.isnan())
    return norm_of(torch.where(same, torch.zeros_like(one), one - other))


def _dense(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)

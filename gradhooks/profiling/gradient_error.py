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


def gradient_errors(gradients: Gradients, expected: Gradients) -> dict[str, float]:
    """Return the norm of the difference of each gradient, relative to the size of the expected one.

    The error is infinite if one of a pair is missing, or not finite, or not sparse, where the other is. A pair that is
    missing has none.

    Args:
        gradients: The gradients, by name.
        expected: Those of the full graph, by name.
    """
    sizes = gradient_sizes(expected)
    errors = {}
    for name, reference in expected.items():
        actual = gradients.get(name)
        if reference is not None and actual is not None and actual.layout == reference.layout:
            errors[name] = difference_of(actual, reference) / sizes[name]
        elif reference is not actual:
            errors[name] = math.inf
    return errors


def gradient_sizes(expected: Gradients) -> dict[str, float]:
    """Return by what the difference of each gradient is divided: its norm, and a part of the largest one at least.

    A gradient smaller than `floor_of` its dtype times the largest one is a difference of larger numbers, of which only
    the rounding errors are left.
    """
    norms = {name: norm_of(value) for name, value in expected.items() if value is not None}
    largest = max((norm for norm in norms.values() if math.isfinite(norm)), default=0.0)
    dtypes = {name: value.dtype for name, value in expected.items() if value is not None}
    sizes = {name: max(norm, floor_of(dtypes[name]) * largest) for name, norm in norms.items()}
    return {name: size if 0 < size < math.inf else 1.0 for name, size in sizes.items()}


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

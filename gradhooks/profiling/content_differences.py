"""Compare what two models hold."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from gradhooks.profiling.gradient_error import difference_of, norm_of
from gradhooks.profiling.model_contents import TensorContent

LEAST_TOLERANCE = 1e-9  # of numbers in float64
LONGEST_TEXT = 100  # of a difference that is told by both values

_ABSENT = object()


class ContentDifference(NamedTuple):
    """Something that differs from the full graph.

    Attributes:
        name: What it is, such as `buffer norm.running_mean`.
        text: How it differs.
    """

    name: str
    text: str


def content_differences(
    actual: Mapping[str, Any], expected: Mapping[str, Any], eps: float
) -> Iterator[ContentDifference]:
    """Yield what differs by more than rounding.

    Args:
        actual: What `read_contents` found.
        expected: What it found after the full graph.
        eps: The rounding error of the dtype in which the model computes.
    """
    sizes = [_size(content) for content in expected.values() if isinstance(content, TensorContent)]
    largest = max((size for size in sizes if size < math.inf), default=0.0)
    for name, reference in expected.items():
        text = _difference(actual.get(name, _ABSENT), reference, eps, largest)
        if text:
            yield ContentDifference(name, text)
    for name in actual.keys() - expected.keys():
        yield ContentDifference(name, "is there, and not after the full graph")


def _size(content: TensorContent) -> float:
    value = content.value
    return norm_of(value) if value.is_floating_point() or value.is_complex() else 0.0


def _difference(actual: Any, expected: Any, eps: float, largest: float) -> str:
    """Return how two values differ; empty if they do not."""
    if actual is _ABSENT:
        return "is missing"
    if isinstance(expected, TensorContent) and isinstance(actual, TensorContent):
        return _tensor_difference(actual, expected, eps, largest)
    if type(actual) is type(expected) is float:
        close = math.isclose(actual, expected, rel_tol=_tolerance(eps)) or (math.isnan(actual) and math.isnan(expected))
        return "" if close else f"is {actual:.6g} instead of {expected:.6g}"
    if _equal(actual, expected):
        return ""
    text = f"is {actual!r} instead of {expected!r}"
    return text if len(text) <= LONGEST_TEXT else "differs"


def _tensor_difference(actual: TensorContent, expected: TensorContent, eps: float, largest: float) -> str:
    one, other = actual.value, expected.value
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return f"is {_form(one)} instead of {_form(other)}"
    difference = difference_of(one, other)
    if not (other.is_floating_point() or other.is_complex()):
        return "" if difference == 0 else f"is {_values(one)} instead of {_values(other)}"
    eps = max(eps, torch.finfo(other.dtype).eps)
    size = max(norm_of(other), eps**0.25 * largest) or 1.0
    return "" if difference <= _tolerance(eps) * size else f"differs by {difference / size:.1e} of its size"


def _tolerance(eps: float) -> float:
    return max(LEAST_TOLERANCE, 10 * float(eps**0.75))


def _values(tensor: torch.Tensor) -> str:
    return str(tensor.tolist()) if tensor.numel() == 1 else "another tensor"


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _equal(one: Any, other: Any) -> bool:
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # `==` of any object
        return False

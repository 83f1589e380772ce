"""What is no more than rounding in the gradients of a model, whatever the dtype of its parameters.

Rules:
    1. A float64 copy of a model may compute in float32 inside (`x.float()`, a softmax in float32). How much that rounds
       shows in the full graph itself: it runs again with a loss of another scale, which in exact arithmetic scales all
       gradients alike. What is left after scaling back is rounding.
    2. A backward that is not linear (a clamp, an added loss) does not scale. So the other scale is very near 1: all
       operations round anew, and what is added or cut off changes by no more than that.
    3. What counts as rounding is limited by the narrowest dtype in the graph. A gradient that differs by more does so
       by chance, and cannot be compared.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gradhooks.profiling.gradient_error import Gradients, gradient_errors, gradient_sizes, norm_of

TOLERANCE = 1e-10  # the least
MARGIN = 100.0  # between the rounding errors of one trial and those of another
LARGEST_TOLERANCE = 0.1


def trial_scale(eps: float) -> float:
    """Return the other scale of the loss, in the last digits of the narrowest dtype; no sum of few powers of two."""
    return 1 + 37 * eps


def narrowest_dtype(root: Tensor) -> torch.dtype:
    """Return the narrowest floating-point dtype in the graph below `root`."""
    narrowest = root.dtype
    pending: list[Any] = [root.grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for data in getattr(node, "_input_metadata", ()):
            if data.dtype.is_floating_point and torch.finfo(data.dtype).eps > torch.finfo(narrowest).eps:
                narrowest = data.dtype
        for following, _ in getattr(node, "next_functions", ()):
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return narrowest


def rounding_tolerances(expected: Gradients, repeated: Gradients, eps: float) -> dict[str, float]:
    """Return which error of each gradient, in the measure of `gradient_errors`, is no more than rounding.

    Args:
        expected: The gradients of the full graph.
        repeated: Its gradients from a loss of another scale, scaled back.
        eps: The rounding error of the narrowest dtype in the graph.
    """
    limits = _limits(expected, eps)
    errors = gradient_errors(repeated, expected)
    sizes = gradient_sizes(expected)
    largest = max(sizes.values(), default=0.0)
    # How much the model rounds, also where it did not show by chance.
    typical = max((errors[name] for name, size in sizes.items() if size >= eps**0.25 * largest), default=0.0)
    return {name: max(TOLERANCE, min(MARGIN * max(errors[name], typical), limit)) for name, limit in limits.items()}


def unrepeatable_gradients(expected: Gradients, repeated: Gradients, eps: float) -> list[str]:
    """Return the gradients that differ by more than rounding when the full graph runs again."""
    limits = _limits(expected, eps)
    errors = gradient_errors(repeated, expected)
    return [name for name, error in errors.items() if not error <= max(TOLERANCE, limits.get(name, 0.0))]


def _limits(expected: Gradients, eps: float) -> dict[str, float]:
    """Return the largest error of each gradient that may be rounding."""
    norms = {name: norm_of(value) for name, value in expected.items() if value is not None}
    largest = max((norm for norm in norms.values() if norm < math.inf), default=0.0)
    limit = min(LARGEST_TOLERANCE, 1000 * eps**0.75)
    return {
        name: limit * max(norms[name], eps**0.25 * largest) / size for name, size in gradient_sizes(expected).items()
    }

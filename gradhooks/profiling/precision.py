"""Precision: what is no more than rounding in the gradients of a model, whatever the dtype of its parameters.

Rules:
    1. A float64 copy of a model may compute in float32 inside (`x.float()`, a softmax in float32). How much that rounds
       shows in the full graph itself: it runs again with a loss of another scale, which in exact arithmetic scales all
       gradients alike. What is left after scaling back is rounding.
    2. A backward that is not linear (a clamp, an added loss) fails this test by far more than rounding. So what counts
       as rounding is limited by the narrowest dtype that takes part in the graph.
"""

from typing import Any

import torch
from torch import Tensor

from gradhooks.profiling.gradient_error import Gradients, difference_of, norm_of

MARGIN = 100.0  # between the rounding error of one trial and that of another


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


def rounding_allowances(expected: Gradients, repeated: Gradients, eps: float) -> dict[str, float]:
    """Return the norm of a difference that is no more than rounding, for each gradient.

    Args:
        expected: The gradients of the full graph.
        repeated: Its gradients from a loss of another scale, scaled back.
        eps: The rounding error of the narrowest dtype in the graph.
    """
    norms = {name: norm_of(value) for name, value in expected.items() if value is not None}
    largest = max((norm for norm in norms.values() if norm < float("inf")), default=0.0)
    noise = {name: _difference(repeated.get(name), expected[name]) for name in norms}
    floor = eps**0.25 * largest
    typical = max((noise[name] / norm for name, norm in norms.items() if norm > max(floor, 0.0)), default=0.0)
    return {
        name: min(MARGIN * max(noise[name], typical * norm), 10 * eps**0.75 * max(norm, floor))
        for name, norm in norms.items()
    }


def _difference(repeated: Tensor | None, expected: Tensor | None) -> float:
    return 0.0 if repeated is None or expected is None else difference_of(repeated, expected)

"""What is no more than rounding in the gradients of a model, whatever the dtype of its parameters.

Rules:
    1. A float64 copy of a model may compute in float32 inside (`x.float()`, a softmax in float32). How much that rounds
       shows in the full graph itself: it runs again with a loss of another scale, which in exact arithmetic scales all
       gradients alike. What is left after scaling back is rounding.
    2. A backward that is not linear (a clamp, an added loss) fails this test by far more than rounding. So what counts
       as rounding is limited by the narrowest dtype that takes part in the graph.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gradhooks.profiling.gradient_error import Gradients, gradient_errors, gradient_sizes, norm_of

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


def rounding_errors(expected: Gradients, repeated: Gradients, eps: float) -> dict[str, float]:
    """Return which error of each gradient, in the measure of `gradient_errors`, is no more than rounding.

    Args:
        expected: The gradients of the full graph.
        repeated: Its gradients from a loss of another scale, scaled back.
        eps: The rounding error of the narrowest dtype in the graph.
    """
    sizes = gradient_sizes(expected)
    errors = {name: error for name, error in gradient_errors(repeated, expected).items() if error < math.inf}
    norms = {name: norm_of(value) for name, value in expected.items() if value is not None}
    largest = max((norm for norm in norms.values() if norm < math.inf), default=0.0)
    floor = eps**0.25 * largest
    # How much the model rounds, also where it did not show by chance.
    typical = max((error for name, error in errors.items() if norms[name] >= floor), default=0.0)
    limits = {name: 10 * eps**0.75 * max(norms[name], floor) / size for name, size in sizes.items()}
    return {name: min(MARGIN * max(errors.get(name, 0.0), typical), limits[name]) for name in sizes}

"""Compare the gradients of two steps."""

from collections.abc import Sequence

from torch import Tensor

FLOOR = 1e-4


def gradient_error(gradients: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the largest difference of a gradient, relative to its norm; infinite if one of a pair is missing.

    A norm below `FLOOR` times that of the largest gradient of the model counts as that: what is as small is a
    difference of larger numbers, of which only the rounding errors are left.
    """
    norms = [0.0 if reference is None else reference.to_dense().norm().item() for reference in expected]
    floor = FLOOR * max([0.0, *norms])
    errors = [0.0]
    for actual, reference, norm in zip(gradients, expected, norms, strict=True):
        if (actual is None) != (reference is None):
            return float("inf")
        if actual is not None and reference is not None:
            difference = (actual.to_dense() - reference.to_dense()).norm().item()
            errors.append(difference / (max(norm, floor) or 1.0))
    return max(errors)

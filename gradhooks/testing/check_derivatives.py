"""Checks of the derivatives of a combination, and of what it declares about them."""

from typing import Any

import torch
from torch import Tensor

from gradhooks.combination import GradientCombination, StreamWeights
from gradhooks.testing.errors import CheckFailed, conformance_check
from gradhooks.testing.inputs import REFERENCE_DTYPE, Sample, make_sample, trainable_parameters

STEP = 1e-6
NUMERICAL_TOLERANCE = 1e-5
"""Accuracy of a central difference with this step for a derivative of order 1; steep combinations lose digits."""
DECLARATION_TOLERANCE = 1e-8


@conformance_check
def check_coefficients(combination: Any) -> None:
    """In float64 the gradient of each prediction agrees with numerical differences."""
    sample = make_sample(combination, 5)
    result = sample.coefficients(sample.predictions).flatten()
    expected = torch.zeros_like(result)
    for index in range(len(result)):
        step = torch.zeros_like(result)
        step[index] = STEP
        expected[index] = _central_difference(sample, step.view_as(sample.predictions))
    _compare(result, expected, "the predictions")


def _central_difference(sample: Sample, step: Tensor) -> float:
    with torch.no_grad():
        above, below = (sample.combine(sample.predictions + sign * step).sum() for sign in (1, -1))
    return (above - below).item() / (2 * STEP)


def _compare(result: Tensor, expected: Tensor, name: str) -> None:
    difference = (result - expected).abs()
    worst = int(difference.argmax())
    if not difference[worst] <= NUMERICAL_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise CheckFailed(
            f"has a gradient of {result[worst]:.6g} with respect to {name} (element {worst}), but numerical "
            f"differences give {expected[worst]:.6g}; does it detach a part, round to float32, or define its own "
            "backward?"
        )


@conformance_check
def check_learnable_parameters(combination: Any) -> None:
    """The gradient of every trainable parameter of the combination agrees with numerical differences."""
    sample = make_sample(combination, 5)
    sample.combine(sample.predictions)  # initializes lazy parameters
    parameters = trainable_parameters(sample.combination)
    if not parameters:
        return
    combined = sample.combine(sample.predictions.clone().requires_grad_()).sum()
    gradients = torch.autograd.grad(combined, list(parameters.values()), allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is None:
            raise CheckFailed(
                f"gives its parameter {name!r} no gradient; use it in forward without detach(), item() or .data, or "
                "make it a buffer"
            )
        direction = torch.randn_like(parameter)
        result = (gradient * direction).sum()
        expected = _central_difference_along(sample, parameter, direction)
        _compare(result.view(1), expected.view(1), f"its parameter {name!r}")


def _central_difference_along(sample: Sample, parameter: Tensor, direction: Tensor) -> Tensor:
    values = []
    with torch.no_grad():
        for step in (1, -2, 1):  # above, below, and back
            parameter.add_(step * STEP * direction)
            values.append(sample.combine(sample.predictions).sum())
    return (values[0] - values[1]) / (2 * STEP)


@conformance_check
def check_stream_declaration(combination: Any) -> None:
    """What `stream_weights` declares explains the coefficients, and depends on each prediction alone."""
    for spread in (1.0, 1e-3, 10.0):
        sample = make_sample(combination, 9)
        if sample.predictions.dim() != 1:
            return  # predictions of several numbers are never streamed
        sample = sample._replace(predictions=sample.predictions * spread)
        declaration = _declare(sample, sample.predictions, 0)
        if declaration is None:
            return
        if isinstance(sample.combination, GradientCombination):
            raise CheckFailed(
                "declares stream_weights and defines combine_gradients, which needs all gradients; remove one of them"
            )
        _check_rows_are_independent(sample, *declaration)
        _check_declaration_explains_coefficients(sample, *declaration)


def declares_stream(combination: Any) -> bool:
    """Return whether the combination declares `stream_weights` for predictions of one number."""
    sample = make_sample(combination, 2)
    return sample.predictions.dim() == 1 and _declare(sample, sample.predictions, 0) is not None


def _check_rows_are_independent(sample: Sample, log_weights: Tensor, features: Tensor) -> None:
    singly = [_declare(sample, row, index) for index, row in enumerate(sample.predictions.split(1))]
    columns = [torch.cat(column) for column in zip(*(one for one in singly if one is not None), strict=True)]
    if len(columns[0]) != len(log_weights) or not (_same(columns[0], log_weights) and _same(columns[1], features)):
        raise CheckFailed(
            "declares other stream_weights for a pose passed alone than for the same pose in a group; row i may depend "
            "on prediction i only (not on a mean, a maximum or a count over the poses of the call)"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def _declare(sample: Sample, predictions: Tensor, start: int) -> tuple[Tensor, Tensor] | None:
    """Return log-weights, shape `(n,)`, and features, shape `(n, K)`, of the poses from `start` on."""
    declaration = sample.bound.declare(predictions.detach(), start)
    if declaration is None:
        return None
    if not isinstance(declaration, (StreamWeights, tuple)):
        raise CheckFailed(
            f"returned {declaration!r} from stream_weights; return StreamWeights(log_weights, features), or None"
        )
    count = len(predictions)
    log_weights, features = declaration
    log_weights = torch.zeros(count) if log_weights is None else log_weights.detach()
    features = torch.zeros(count, 0) if features is None else features.detach()
    features = features.unsqueeze(1) if features.dim() == 1 else features
    if log_weights.shape != (count,) or features.dim() != 2 or len(features) != count:  # noqa: PLR2004
        raise CheckFailed(
            f"declares log_weights of shape {tuple(log_weights.shape)} and features of shape {tuple(features.shape)} "
            f"for {count} predictions; return shapes ({count},) and ({count},) or ({count}, K)"
        )
    if not (log_weights.isfinite().all() and features.isfinite().all()):
        raise CheckFailed("declares stream_weights that are not finite for finite predictions")
    return log_weights.to(REFERENCE_DTYPE), features.to(REFERENCE_DTYPE)


def _check_declaration_explains_coefficients(sample: Sample, log_weights: Tensor, features: Tensor) -> None:
    """Fit `c_i = exp(l_i) (a_0 + sum_k a_k features[i, k])`, as the accumulator `stream` does."""
    coefficients = sample.coefficients(sample.predictions)
    top = log_weights.argmax()
    columns = torch.cat([torch.ones(len(features), 1), features - features[top]], dim=1)
    weights = (log_weights - log_weights[top]).exp().unsqueeze(1) * columns
    # Columns of equal size: else the solver treats features that are all small as rounding errors.
    weights = weights / weights.norm(dim=0).clamp_min(torch.finfo(REFERENCE_DTYPE).tiny)
    fitted = torch.linalg.lstsq(weights, coefficients.unsqueeze(1), driver="gelsd").solution
    residual = (coefficients - (weights @ fitted).squeeze(1)).abs()
    worst = int(residual.argmax())
    if not residual[worst] <= DECLARATION_TOLERANCE * coefficients.abs().max():
        raise CheckFailed(
            f"declares stream_weights that do not explain its coefficients: pose {worst}, with the prediction "
            f"{sample.predictions[worst]:.4g}, has the coefficient {coefficients[worst]:.6g}, from which the best fit "
            f"differs by {residual[worst]:.2g}. exp(log_weights) * (a_0 + a_1 feature_1 + ...) must be the derivative "
            "of forward, with numbers a that are the same for all poses; correct it, or return None (the gradients are "
            "exact either way, but every such pose is run twice)"
        )


CHECKS = (
    check_coefficients,
    check_learnable_parameters,
    check_stream_declaration,
)

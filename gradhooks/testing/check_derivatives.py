"""Checks of the derivatives of a combination, and of what it declares about them."""

from typing import Any

import torch
from torch import Tensor

from gradhooks.combination import GradientCombination, StreamWeights
from gradhooks.testing.errors import CheckFailed, named
from gradhooks.testing.inputs import REFERENCE_DTYPE, Sample, parameters, sample

STEP = 1e-6
NUMERICAL = 1e-5
"""What a central difference with that step knows of a derivative of order 1; steep combinations lose digits."""
EXPLAINED = 1e-8


@named
def check_coefficients(combination: Any) -> None:
    """In float64 the gradient that autograd finds for each prediction is that of numerical differences."""
    given = sample(combination, 5)
    found = given.coefficients(given.predictions).flatten()
    expected = torch.zeros_like(found)
    for place in range(len(found)):
        step = torch.zeros_like(found)
        step[place] = STEP
        expected[place] = _slope(given, step.view_as(given.predictions))
    _compare(found, expected, "the predictions")


def _slope(given: Sample, step: Tensor) -> float:
    with torch.no_grad():
        above, below = (given.combined(given.predictions + sign * step).sum() for sign in (1, -1))
    return (above - below).item() / (2 * STEP)


def _compare(found: Tensor, expected: Tensor, of: str) -> None:
    difference = (found - expected).abs()
    worst = int(difference.argmax())
    if not difference[worst] <= NUMERICAL * max(1.0, expected.abs().max().item()):
        raise CheckFailed(
            f"has a gradient of {found[worst]:.6g} by {of} (number {worst}) where numerical differences give "
            f"{expected[worst]:.6g}; does it detach a part, round to float32, or define a backward of its own?"
        )


@named
def check_learnable_parameters(combination: Any) -> None:
    """Every trainable parameter of the combination gets the gradient of numerical differences."""
    given = sample(combination, 5)
    given.combined(given.predictions)  # initialises lazy parameters
    trained = parameters(given.bound.combination)
    if not trained:
        return
    result = given.combined(given.predictions.clone().requires_grad_()).sum()
    gradients = torch.autograd.grad(result, list(trained.values()), allow_unused=True)
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        if gradient is None:
            raise CheckFailed(
                f"gives its parameter {name!r} no gradient; use it in forward without detach(), item() or .data, or "
                "make it a buffer"
            )
        direction = torch.randn_like(parameter)
        found = (gradient * direction).sum()
        _compare(found.view(1), _slope_along(given, parameter, direction).view(1), f"its parameter {name!r}")


def _slope_along(given: Sample, parameter: Tensor, direction: Tensor) -> Tensor:
    results = []
    with torch.no_grad():
        for sign in (1, -2, 1):  # up, down, and back to where it was
            parameter.add_(sign * STEP * direction)
            results.append(given.combined(given.predictions).sum())
    return (results[0] - results[1]) / (2 * STEP)


@named
def check_stream_declaration(combination: Any) -> None:
    """What `stream_weights` declares explains the coefficients, and depends on each prediction alone."""
    for spread in (1.0, 1e-3, 10.0):
        given = sample(combination, 9)
        if given.predictions.dim() != 1:
            return  # predictions of several numbers are never streamed
        given = given._replace(predictions=given.predictions * spread)
        declaration = _declared(given, given.predictions, 0)
        if declaration is None:
            return
        if isinstance(given.bound.combination, GradientCombination):
            raise CheckFailed(
                "declares stream_weights and defines combine_gradients, which needs all gradients; drop one"
            )
        log_weights, features = declaration
        singly = [_declared(given, row, place) for place, row in enumerate(given.predictions.split(1))]
        apart = [torch.cat(column) for column in zip(*(one for one in singly if one is not None), strict=True)]
        if len(apart[0]) != len(log_weights) or not (_same(apart[0], log_weights) and _same(apart[1], features)):
            raise CheckFailed(
                "declares other stream_weights for a pose that comes alone than for the same pose in a group; row i "
                "may depend on prediction i only (no mean, maximum or count over the poses that happen to be there)"
            )
        _explain(given, log_weights, features)


def declares_stream(combination: Any) -> bool:
    """Whether it declares `stream_weights` for predictions of one number."""
    given = sample(combination, 2)
    return given.predictions.dim() == 1 and _declared(given, given.predictions, 0) is not None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def _declared(given: Sample, predictions: Tensor, start: int) -> tuple[Tensor, Tensor] | None:
    """Log-weights, shape `(n,)`, and features, shape `(n, K)`, of the poses from `start` on."""
    claim = given.bound.declare(predictions.detach(), start)
    if claim is None:
        return None
    if not isinstance(claim, (StreamWeights, tuple)):
        raise CheckFailed(f"stream_weights returned {claim!r}; return StreamWeights(log_weights, features), or None")
    count = len(predictions)
    log_weights, features = claim
    log_weights = torch.zeros(count) if log_weights is None else log_weights.detach()
    features = torch.zeros(count, 0) if features is None else features.detach()
    features = features.unsqueeze(1) if features.dim() == 1 else features
    if log_weights.shape != (count,) or features.dim() != 2 or len(features) != count:  # noqa: PLR2004
        raise CheckFailed(
            f"declares log_weights of shape {tuple(log_weights.shape)} and features of shape {tuple(features.shape)} "
            f"for {count} predictions; give ({count},) and ({count},) or ({count}, K)"
        )
    if not (log_weights.isfinite().all() and features.isfinite().all()):
        raise CheckFailed("declares stream_weights that are not finite, for finite predictions")
    return log_weights.to(REFERENCE_DTYPE), features.to(REFERENCE_DTYPE)


def _explain(given: Sample, log_weights: Tensor, features: Tensor) -> None:
    """Fit `c_i = exp(l_i) (a_0 + sum_k a_k features[i, k])`, as the accumulator `stream` does."""
    coefficients = given.coefficients(given.predictions)
    top = log_weights.argmax()
    centred = features - features[top]
    weights = (log_weights - log_weights[top]).exp().unsqueeze(1) * torch.cat([torch.ones(9, 1), centred], dim=1)
    sizes = weights.norm(dim=0).clamp_min(torch.finfo(REFERENCE_DTYPE).tiny)
    fitted = torch.linalg.lstsq(weights / sizes, coefficients.unsqueeze(1), driver="gelsd").solution
    left = (coefficients - (weights / sizes @ fitted).squeeze(1)).abs()
    worst = int(left.argmax())
    if not left[worst] <= EXPLAINED * coefficients.abs().max():
        raise CheckFailed(
            f"declares stream_weights that do not explain its coefficients: pose {worst}, with the prediction "
            f"{given.predictions[worst]:.4g}, has d combined / d prediction = {coefficients[worst]:.6g}, of which the "
            f"best fit leaves {left[worst]:.2g}. exp(log_weights) * (a_0 + a_1 feature_1 + ...) must be the derivative "
            "of forward, with numbers a that all poses share; mend it, or return None (training is right either way, "
            "but every such pose would run twice)"
        )


CHECKS = (
    check_coefficients,
    check_learnable_parameters,
    check_stream_declaration,
)

"""Checks of what a combination returns."""

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradhooks.numerics import per_row
from gradhooks.testing.errors import CheckFailed, conformance_check
from gradhooks.testing.inputs import largest_difference, make_sample, trainable_parameters

REPEAT_TOLERANCE = 1e-12
ORDER_TOLERANCE = 1e-9


@conformance_check
def check_result_shape(combination: Any) -> None:
    """The result of 5 poses is finite and has the shape of one prediction."""
    sample = make_sample(combination, 5)
    result = sample.combine(sample.predictions)
    expected_shape = sample.predictions.shape[1:]
    if result.shape != expected_shape:
        raise CheckFailed(
            f"returned shape {tuple(result.shape)} for predictions of shape {tuple(sample.predictions.shape)}; reduce "
            f"axis 0 and no other, to shape {tuple(expected_shape)}, so that a loss for one pose applies to a group"
        )
    if not result.isfinite().all():
        raise CheckFailed(f"returned {_shown(result)} for the finite predictions {_shown(sample.predictions)}")


@conformance_check
def check_one_pose(combination: Any) -> None:
    """A group of one pose has a finite result of the shape of its prediction, and finite coefficients."""
    sample = make_sample(combination, 1)
    result = sample.combine(sample.predictions)
    if result.shape != sample.predictions.shape[1:]:
        raise CheckFailed(
            f"returned shape {tuple(result.shape)} for one pose with a prediction of shape "
            f"{tuple(sample.predictions.shape[1:])}; does it call squeeze() without an axis?"
        )
    if not (result.isfinite().all() and sample.coefficients(sample.predictions).isfinite().all()):
        raise CheckFailed(
            "has a result or a gradient that is not finite for a group of one pose; does it divide by N - 1?"
        )


@conformance_check
def check_order_of_poses(combination: Any) -> None:
    """The result does not depend on the order of the poses, except for rounding."""
    sample = make_sample(combination, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    result, expected = sample.bound(sample.predictions, order), sample.bound(sample.predictions)
    difference = largest_difference(result, expected)
    if not difference <= ORDER_TOLERANCE:
        raise CheckFailed(
            f"depends on the order of the poses: the result differs by {difference:.2g}; reduce over axis 0 without "
            "indices, or declare expected_failures = {'check_order_of_poses': 'why the order matters'}"
        )


@conformance_check
def check_repeatable(combination: Any) -> None:
    """The same predictions give the same result a second time, and are not changed."""
    sample = make_sample(combination, 5)
    original = sample.predictions.clone()
    first = sample.combine(sample.predictions).detach().clone()
    if not torch.equal(original, sample.predictions):
        raise CheckFailed(
            "changed the predictions in place; use out-of-place operations (add instead of add_, torch.where, clone)"
        )
    second = sample.combine(sample.predictions)
    if not largest_difference(second, first) <= REPEAT_TOLERANCE:
        raise CheckFailed(
            f"returned {_shown(first)}, then {_shown(second)} for the same predictions; a group is combined a second "
            "time by prediction.coefficients(), so draw no random numbers and keep no state in forward"
        )


@conformance_check
def check_extreme_values(combination: Any) -> None:
    """Predictions that are huge, all equal, or 1e4 apart give a finite result and finite gradients."""
    for dtype in (torch.float32, torch.float64):
        sample = make_sample(combination, 6, dtype=dtype)
        for kind, predictions in _extreme_predictions(sample.predictions).items():
            leaf = predictions.requires_grad_()
            result = sample.combine(leaf)
            inputs = {"the predictions": leaf, **trainable_parameters(sample.combination)}
            gradients = torch.autograd.grad(result.sum(), list(inputs.values()), allow_unused=True)
            numbers: dict[str, Tensor | None] = {"its result": result}
            numbers.update({f"the gradient of {name}": part for name, part in zip(inputs, gradients, strict=True)})
            _check_finite(numbers, f"predictions in {dtype} are {kind}")


def _check_finite(numbers: Mapping[str, Tensor | None], condition: str) -> None:
    for name, tensor in numbers.items():
        if tensor is not None and not tensor.isfinite().all():
            raise CheckFailed(
                f"is not finite: {name} is {_shown(tensor)} if {condition}; compute with logarithms (logsumexp, "
                "softmax, logsigmoid), and note that torch.where passes NaN gradients of the branch that is not taken"
            )


def _extreme_predictions(like: Tensor) -> dict[str, Tensor]:
    ramp = torch.linspace(-1, 1, len(like), dtype=like.dtype)
    ramp = per_row(ramp, like).expand_as(like)
    return {
        "all 1e4": torch.full_like(like, 1e4),
        "all -1e4": torch.full_like(like, -1e4),
        "all 0": torch.zeros_like(like),
        "all equal": like[:1].expand_as(like).clone(),
        "spread from -5e3 to 5e3": ramp * 5e3,
        "spread from 9e4 to 1.1e5": ramp * 1e4 + 1e5,
        "spread from -1.1e5 to -9e4": ramp * 1e4 - 1e5,
    }


@conformance_check
def check_dtype_and_device(combination: Any) -> None:
    """The result and the coefficients have the dtype and the device of the predictions."""
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.float64):
            sample = make_sample(combination, 4, dtype=dtype, device=device)
            result = sample.combine(sample.predictions)
            if result.dtype != dtype or result.device.type != device:
                raise CheckFailed(
                    f"returned {result.dtype} on {result.device.type} for predictions in {dtype} on {device}; create "
                    "tensors with dtype= and device= of the predictions, and return result.to(predictions.dtype)"
                )
            sample.coefficients(sample.predictions)


@conformance_check
def check_copies(combination: Any) -> None:
    """The combination can be copied and pickled, as models in checkpoints and in worker processes are."""
    sample = make_sample(combination, 4)
    expected = sample.combine(sample.predictions)
    copiers = {"copy.deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}  # noqa: S301
    for how, make_copy in copiers.items():
        try:
            copied = make_copy(sample.combination)
        except Exception as error:
            raise CheckFailed(
                f"cannot be copied by {how}: {type(error).__name__}: {error}; do not store lambdas, local classes or "
                "open handles in attributes"
            ) from error
        bound = type(sample.bound)(copied, 4, sample.bound.arguments)
        result = sample._replace(bound=bound).combine(sample.predictions)
        if not largest_difference(result, expected) <= REPEAT_TOLERANCE:
            raise CheckFailed(
                f"returns {_shown(result)} instead of {_shown(expected)} after {how}; which state is not copied?"
            )


def _shown(tensor: Tensor) -> str:
    flat = tensor.detach().flatten()
    more = ", ..." if len(flat) > 6 else ""  # noqa: PLR2004
    return "[" + ", ".join(f"{number:.4g}" for number in flat[:6].tolist()) + more + "]"


CHECKS = (
    check_result_shape,
    check_one_pose,
    check_order_of_poses,
    check_repeatable,
    check_extreme_values,
    check_dtype_and_device,
    check_copies,
)

"""Checks of what a combination returns."""

import copy
import pickle
from typing import Any

import torch
from torch import Tensor

from gradhooks.testing.errors import CheckFailed, named
from gradhooks.testing.inputs import largest_difference, parameters, sample

SAME = 1e-12
REORDERED = 1e-9


@named
def check_result_shape(combination: Any) -> None:
    """The result of 5 poses is finite and has the shape of one prediction."""
    given = sample(combination, 5)
    result = given.combined(given.predictions)
    wanted = given.predictions.shape[1:]
    if result.shape != wanted:
        raise CheckFailed(
            f"made shape {tuple(result.shape)} of predictions of shape {tuple(given.predictions.shape)}; reduce axis 0 "
            f"alone, so that shape {tuple(wanted)} is left and loss code for one pose serves a group"
        )
    if not result.isfinite().all():
        raise CheckFailed(f"made {_shown(result)} of the finite predictions {_shown(given.predictions)}")


@named
def check_one_pose(combination: Any) -> None:
    """A group of one pose is a group: finite result, finite coefficients, the same shape."""
    given = sample(combination, 1)
    result = given.combined(given.predictions)
    if result.shape != given.predictions.shape[1:]:
        raise CheckFailed(
            f"made shape {tuple(result.shape)} of one pose with a prediction of shape "
            f"{tuple(given.predictions.shape[1:])}; does it squeeze() without an axis?"
        )
    if not (result.isfinite().all() and given.coefficients(given.predictions).isfinite().all()):
        raise CheckFailed("is not finite, or has no finite gradient, for a group of one pose; does it divide by N - 1?")


@named
def check_order_of_poses(combination: Any) -> None:
    """Another order of the poses gives the same result, to rounding."""
    given = sample(combination, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found, expected = given.bound(given.predictions, order), given.bound(given.predictions)
    difference = largest_difference(found, expected)
    if not difference <= REORDERED:
        raise CheckFailed(
            f"depends on the order of the poses: by {difference:.2g} of its result; reduce over axis 0 without "
            f"indices, or declare expected_failures = {{'check_order_of_poses': 'why the order counts'}}"
        )


@named
def check_repeatable(combination: Any) -> None:
    """The same predictions give the same result again, and are left unchanged."""
    given = sample(combination, 5)
    kept = given.predictions.clone()
    first = given.combined(given.predictions).detach().clone()
    if not torch.equal(kept, given.predictions):
        raise CheckFailed("changed the predictions in place; work on a copy (add instead of add_, torch.where, clone)")
    again = given.combined(given.predictions)
    if not largest_difference(again, first) <= SAME:
        raise CheckFailed(
            f"gave {_shown(first)}, then {_shown(again)} for the same predictions; gradhooks combines a group again "
            "for prediction.weights, so draw no random numbers and keep no state in forward"
        )


@named
def check_extreme_values(combination: Any) -> None:
    """Predictions that are huge, all equal, or 1e4 apart give a finite result and finite gradients."""
    for dtype in (torch.float32, torch.float64):
        given = sample(combination, 6, dtype=dtype)
        for kind, predictions in _extremes(given.predictions).items():
            leaf = predictions.requires_grad_()
            result = given.combined(leaf)
            trained = {"the predictions": leaf, **parameters(given.bound.combination)}
            found = torch.autograd.grad(result.sum(), list(trained.values()), allow_unused=True)
            numbers: dict[str, Tensor | None] = {"its result": result}
            numbers.update({f"the gradient of {name}": part for name, part in zip(trained, found, strict=True)})
            for what, tensor in numbers.items():
                if tensor is not None and not tensor.isfinite().all():
                    raise CheckFailed(
                        f"{what} is {_shown(tensor)} where predictions in {dtype} are {kind}; work with logarithms "
                        "(logsumexp, softmax, logsigmoid), and remember that torch.where sends NaN back from the "
                        "branch that was not taken"
                    )


def _extremes(like: Tensor) -> dict[str, Tensor]:
    count = len(like)
    ramp = torch.linspace(-1, 1, count, dtype=like.dtype).view(-1, *[1] * (like.dim() - 1)).expand_as(like)
    return {
        "all 1e4": torch.full_like(like, 1e4),
        "all -1e4": torch.full_like(like, -1e4),
        "all 0": torch.zeros_like(like),
        "all equal": like[:1].expand_as(like).clone(),
        "spread from -5e3 to 5e3": ramp * 5e3,
        "spread from 9e4 to 1.1e5": ramp * 1e4 + 1e5,
        "spread from -1.1e5 to -9e4": ramp * 1e4 - 1e5,
    }


@named
def check_dtype_and_device(combination: Any) -> None:
    """The result has the dtype and the device of the predictions, and so have the coefficients."""
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.float64):
            given = sample(combination, 4, dtype=dtype, device=device)
            result = given.combined(given.predictions)
            if result.dtype != dtype or result.device.type != device:
                raise CheckFailed(
                    f"made {result.dtype} on {result.device.type} of predictions in {dtype} on {device}; create "
                    "tensors with dtype= and device= of the predictions, and end with .to(predictions.dtype)"
                )
            given.coefficients(given.predictions)


@named
def check_copies(combination: Any) -> None:
    """It can be copied and pickled, as models in checkpoints and in worker processes are."""
    given = sample(combination, 4)
    own = given.bound.combination
    expected = given.combined(given.predictions)
    copies = {"copy.deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}  # noqa: S301
    for how, make in copies.items():
        try:
            twin = make(own)
        except Exception as fault:
            raise CheckFailed(
                f"cannot be copied by {how}: {type(fault).__name__}: {fault}; keep lambdas, local classes and open "
                "handles out of its attributes"
            ) from fault
        found = given._replace(bound=type(given.bound)(twin, 4, given.bound.arguments)).combined(given.predictions)
        if not largest_difference(found, expected) <= SAME:
            raise CheckFailed(
                f"gives {_shown(found)} instead of {_shown(expected)} after {how}; what state does it lose?"
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

"""Checks of a combination of several groups: `forward_groups` does what `forward` does for each group."""

from typing import Any

import torch
from torch import Tensor

from gradhooks.combination import BoundCombination
from gradhooks.combined import result_of
from gradhooks.group_index import GroupIndex
from gradhooks.group_loop import loop_over_groups
from gradhooks.numerics import per_row
from gradhooks.row_arguments import row_arguments
from gradhooks.testing.errors import CheckFailed, conformance_check
from gradhooks.testing.inputs import Sample, largest_difference, make_sample, trainable_parameters

GROUPS = torch.tensor([2, 0, 1, 0, 2, 3, 0, 1, 0])
"""Interleaved groups of 4, 2, 2 and 1 poses."""
COUNT = 4
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
FAR_APART = 1e3
FAR_TOLERANCE = 1e-6
"""Derivatives by a parameter lose digits to cancellation in `forward` too; a mistake gives zeros or NaN."""


@conformance_check
def check_groups(combination: Any) -> None:
    """`forward_groups` gives the results, the derivatives and the dtype of `forward` for each group."""
    for dtype, tolerance in TOLERANCES.items():
        _compare_with_loop(make_sample(combination, len(GROUPS), dtype=dtype), tolerance, str(dtype))
    if not hasattr(combination, "example"):  # any numbers are valid
        sample = make_sample(combination, len(GROUPS))
        far = sample.predictions + per_row(FAR_APART * GROUPS, sample.predictions)
        kind = f"groups whose predictions are {FAR_APART:g} apart"
        _compare_with_loop(sample._replace(predictions=far), FAR_TOLERANCE, kind)


def _compare_with_loop(sample: Sample, tolerance: float, kind: str) -> None:
    results, expected = _results(sample, by_loop=False), _results(sample, by_loop=True)
    for name, tensor in expected.items():
        if results[name].dtype != tensor.dtype:
            raise CheckFailed(f"returned {results[name].dtype} from forward_groups, and {tensor.dtype} from forward")
        difference = largest_difference(results[name], tensor)
        if not difference <= tolerance:
            raise CheckFailed(
                f"has another {name} in forward_groups than in forward: it differs by {difference:.2g} ({kind}). "
                "Row b must be what forward returns for the poses with groups == b; gradhooks.group_reductions has "
                "sums, means, maxima and softmax over groups"
            )


def _results(sample: Sample, *, by_loop: bool) -> dict[str, Tensor]:
    """Return the combined predictions of all groups, and their derivatives by predictions and parameters."""
    leaf = sample.predictions.clone().requires_grad_()
    combined = _combine_one_by_one(sample, leaf) if by_loop else _combine(sample, leaf)
    inputs = {"the predictions": leaf, **trainable_parameters(sample.combination)}
    # Another cotangent for each number, so that exchanged groups do not add up to the same.
    cotangents = torch.linspace(0.5, 2, combined.numel(), dtype=combined.dtype).view_as(combined)
    gradients = torch.autograd.grad(combined, list(inputs.values()), cotangents, materialize_grads=True)
    named = {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"result": combined.detach(), **named}


def _combine(sample: Sample, predictions: Tensor, count: int = COUNT) -> Tensor:
    groups = GroupIndex(GROUPS, count)
    return BoundCombination(sample.combination, len(GROUPS), sample.bound.arguments, groups)(predictions)


def _combine_one_by_one(sample: Sample, predictions: Tensor) -> Tensor:
    arguments = sample.bound.arguments
    names = row_arguments(arguments, len(GROUPS))
    return result_of(loop_over_groups(sample.combination, predictions, GroupIndex(GROUPS, COUNT), arguments, names))


@conformance_check
def check_groups_are_independent(combination: Any) -> None:
    """A prediction that is NaN or infinite changes the result and the derivatives of its own group only."""
    sample = make_sample(combination, len(GROUPS))
    expected = _results(sample, by_loop=False)
    spoiled = 1
    kept = {
        "result": torch.arange(COUNT) != GROUPS[spoiled],
        "gradient of the predictions": GROUPS[spoiled] != GROUPS,
    }
    for number in (torch.nan, torch.inf, -torch.inf):
        predictions = sample.predictions.clone()
        predictions[spoiled] = number
        results = _results(sample._replace(predictions=predictions), by_loop=False)
        for name, rows in kept.items():
            if not largest_difference(results[name][rows], expected[name][rows]) <= TOLERANCES[torch.float64]:
                raise CheckFailed(
                    f"has another {name} of a group in forward_groups if a prediction of another group is {number}; "
                    "multiply by no mask of groups (0 * NaN is NaN), and use no maximum over all groups"
                )


@conformance_check
def check_empty_groups(combination: Any) -> None:
    """With `accepts_empty_groups`, an empty group has a result, and the results of the others stay as they are."""
    accepts = getattr(combination, "accepts_empty_groups", False)
    if not isinstance(accepts, bool):
        raise CheckFailed(f"has accepts_empty_groups = {accepts!r}; it must be True or False")
    if not accepts:
        return
    sample = make_sample(combination, len(GROUPS))
    combined, without = _combine(sample, sample.predictions, COUNT + 1), _combine(sample, sample.predictions)
    names = row_arguments(sample.bound.arguments, len(GROUPS))
    no_rows = {name: value[:0] if name in names else value for name, value in sample.bound.arguments.items()}
    expected = result_of(sample.combination(sample.predictions[:0], **no_rows))
    if combined[COUNT].isnan().any() or not torch.equal(combined[COUNT], expected):
        raise CheckFailed(
            f"has the result {combined[COUNT].tolist()} for an empty group, and forward returns {expected.tolist()} "
            "for no predictions; return one number, not NaN, or declare accepts_empty_groups = False"
        )
    if not largest_difference(combined[:COUNT], without) <= TOLERANCES[torch.float64]:
        raise CheckFailed("has other results for groups with poses if another group is empty")


CHECKS = (
    check_groups,
    check_groups_are_independent,
    check_empty_groups,
)

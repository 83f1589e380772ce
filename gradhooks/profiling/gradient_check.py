"""Check that gradhooks trains a user's model as the full graph does."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import Unpack

from gradhooks import registry
from gradhooks.options import OPTION_NAMES, Options, OptionTypes, refuse_unknown_options
from gradhooks.profiling.check_result import TOLERANCE, CheckedAccumulator, GradientCheck
from gradhooks.profiling.checked_batch import CheckedBatch, CheckedLoss
from gradhooks.profiling.content_differences import content_differences
from gradhooks.profiling.gradient_error import gradient_errors
from gradhooks.profiling.preserved_state import preserved_state
from gradhooks.profiling.rounding import rounding_errors
from gradhooks.profiling.step_record import StepRecord
from gradhooks.profiling.training_batch import CombinationLike
from gradhooks.profiling.training_steps import sum_of_combined, used_options
from gradhooks.profiling.trial import NoGradientError, Trials

ACCUMULATORS = ("store", "stream", "recompute", "auto")
SCALE = 1 / 3  # of the loss of the second full graph; not a power of two, so that every operation rounds anew
NOTHING_TO_COMPARE = (
    "no leaf has a gradient in the full graph, so that there is nothing to compare. Is the model frozen, by "
    "requires_grad_(False) or torch.jit.freeze, or does it compute without autograd? Poses that require grad make a "
    "frozen model comparable"
)


def gradcheck(
    model: nn.Module,
    poses: Any,
    combination: CombinationLike = "mean",
    *,
    groups: Any = None,
    loss: CheckedLoss = sum_of_combined,
    **options: Unpack[OptionTypes],
) -> GradientCheck:
    """Compare two training steps of every accumulator with those of the full graph, on float64 copies of the model.

    Compared are the gradients of all parameters, of poses and of other leaves that the loss reaches; the values of
    parameters and buffers; attributes of modules and what is in them; the states of random generators. The model, its
    `.grad` and the global generators are left as they were.

    Gradients may differ by 1e-10 of their size, and by what the model itself rounds, if it computes in less than
    float64; see `gradient_errors` and `rounding_errors`.

    Args:
        model: The bare model.
        poses: A list of poses, a stacked tensor, a mapping of stacked tensors, or `Groups`; few enough for the full
            graph in float64.
        combination: As for `MultiPose`.
        groups: The group of each pose, shape `(M,)`; by default the poses are one group.
        loss: Of a prediction; the sum of the combined prediction by default. With a second parameter it also gets the
            model, a copy: `loss=lambda prediction, model: prediction.combined.sum() + model.balance`.
        **options: Further options of `MultiPose`, for the accumulators that use them. `memory` counts in the last row.

    Raises:
        TypeError: The model cannot be copied, or its copy uses parameters of the original.
    """
    refuse_unknown_options(options, OPTION_NAMES)
    batch = CheckedBatch(model, poses, combination, groups, loss, options)
    with preserved_state(model):
        try:
            return _check(batch, [])
        except NoGradientError:
            return GradientCheck((), (), NOTHING_TO_COMPARE)


def _check(batch: CheckedBatch, notes: list[str]) -> GradientCheck:
    """Compare in float64 or, if the full graph cannot run in it, in the dtype of the model."""
    trials = Trials(batch)
    try:
        try:
            expected = trials.full_graph()
        except (RuntimeError, ValueError) as error:
            if not batch.wide:
                raise
            first_line = str(error).partition("\n")[0]
            notes = [f"compared in the model's own dtype, since the full graph fails in float64: {first_line}"]
        else:
            return _compare(trials, expected, notes, batch.options)
    finally:
        trials.restore()
    return _check(replace(batch, wide=False), notes)


class _Reference(NamedTuple):
    """What all rows are compared with.

    Attributes:
        steps: What the full graph left.
        tolerances: For each step, by gradient: an error that is no more than rounding.
        unstable: Contents that differ when the full graph itself runs again.
        eps: The rounding error of the narrowest dtype in the graph.
    """

    steps: list[StepRecord]
    tolerances: list[dict[str, float]]
    unstable: list[str]
    eps: float


def _compare(trials: Trials, steps: list[StepRecord], notes: list[str], options: Mapping[str, Any]) -> GradientCheck:
    reference = _repeat(trials, steps)
    if reference.unstable:
        names = ", ".join(reference.unstable)
        notes.append(f"not compared, since the full graph itself differs when it runs again: {names}")
    tolerance = max(error for errors in reference.tolerances for error in [TOLERANCE, *errors.values()])
    if tolerance > TOLERANCE:
        notes.append(
            f"the model computes in {str(trials.narrowest).removeprefix('torch.')} in places; gradients agree if they "
            f"differ by no more than its rounding errors, {tolerance:.0e}"
        )
    if trials.draws and options.get("chunk_size") is None:
        options = {**options, "chunk_size": 1}  # a chunk draws other random numbers than its poses one by one
    rows = [_row(name, chosen, trials, reference) for name, chosen in _settings(options)]
    first = steps[0].gradients
    unused = tuple(name for name in trials.trainable if first[f"parameter {name}"] is None)
    reason = NOTHING_TO_COMPARE if all(gradient is None for gradient in first.values()) else None
    return GradientCheck(tuple(rows), unused, reason, tuple(notes))


def _repeat(trials: Trials, steps: list[StepRecord]) -> _Reference:
    """Run the full graph again, to learn what of a difference is rounding."""
    pairs = list(zip(steps, trials.repeat_full_graph(steps, SCALE), strict=True))
    tolerances = [
        {name: max(TOLERANCE, error) for name, error in errors.items()}
        for errors in (rounding_errors(one.gradients, other.gradients, trials.eps) for one, other in pairs)
    ]
    unstable = {
        difference.name: None
        for one, other in pairs
        for difference in content_differences(other.contents, one.contents, trials.eps)
    }
    return _Reference(steps, tolerances, list(unstable), trials.eps)


def _settings(options: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return names and options of the rows: each accumulator without memory, then the given or default memory."""
    memory = options.get("memory", Options.memory)
    accumulators = [registry.accumulators.resolve(name) for name in ACCUMULATORS]
    intercepting = {**options, "memory": 0}
    return [
        *(
            (name, {**used_options(intercepting, each, accumulators), "accumulator": name})
            for name, each in zip(ACCUMULATORS, accumulators, strict=True)
        ),
        (f"memory={memory}", {**options, "memory": memory}),
    ]


def _row(name: str, options: Mapping[str, Any], trials: Trials, reference: _Reference) -> CheckedAccumulator:
    """Compare two steps with those of the full graph; the second one only if the first agrees."""
    try:
        steps = trials.multipose(**options)
    except Exception as error:  # a refusal belongs to the result
        return CheckedAccumulator(name, math.inf, error=error)
    largest = 0.0
    for number, (actual, expected) in enumerate(zip(steps, reference.steps, strict=True)):
        tolerances = reference.tolerances[number]
        errors = gradient_errors(actual.gradients, expected.gradients)
        largest = max([largest, *errors.values()])
        wrong = [
            leaf for leaf in sorted(errors, key=errors.__getitem__) if not errors[leaf] <= tolerances.get(leaf, 0.0)
        ]
        found = [_describe(leaf, errors[leaf], actual, expected) for leaf in reversed(wrong)]
        known = {*reference.unstable, *wrong}  # a wrong gradient makes a wrong parameter
        contents = content_differences(actual.contents, expected.contents, reference.eps)
        found += [f"{difference.name} {difference.text}" for difference in contents if difference.name not in known]
        if found:
            return CheckedAccumulator(name, largest, tuple(f"{text} (step {number + 1})" for text in found))
    return CheckedAccumulator(name, largest)


def _describe(leaf: str, error: float, actual: StepRecord, expected: StepRecord) -> str:
    """Return how a gradient differs."""
    gradient, right = actual.gradients.get(leaf), expected.gradients[leaf]
    if right is None:
        return f".grad of {leaf} is there, and None in the full graph"
    if gradient is None:
        return f".grad of {leaf} is None"
    if gradient.layout != right.layout:
        return f".grad of {leaf} is {_layout(gradient)} instead of {_layout(right)}"
    return f"gradient of {leaf} is off by {error:.1e} of its size"


def _layout(gradient: Tensor) -> str:
    return "sparse" if gradient.is_sparse else "dense"

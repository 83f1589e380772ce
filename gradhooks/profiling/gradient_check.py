"""Check that gradhooks trains a user's model as the full graph does."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from gradhooks import registry
from gradhooks.options import OPTION_NAMES, Options, OptionTypes, refuse_unknown_options
from gradhooks.profiling.check_result import CheckedAccumulator, GradientCheck
from gradhooks.profiling.checked_batch import CheckedBatch, CheckedLoss
from gradhooks.profiling.content_differences import content_differences
from gradhooks.profiling.deep_copy import is_uninitialized
from gradhooks.profiling.full_graph_reference import NOTHING_TO_COMPARE, FullGraphReference, full_graph_reference
from gradhooks.profiling.gradient_error import gradient_errors
from gradhooks.profiling.model_contents import TensorContent
from gradhooks.profiling.preserved_state import preserved_state
from gradhooks.profiling.step_record import StepRecord
from gradhooks.profiling.training_batch import CombinationLike
from gradhooks.profiling.training_steps import sum_of_combined, used_options
from gradhooks.profiling.trial import NoGradientError, Trials

ACCUMULATORS = ("store", "stream", "recompute", "auto")


def gradcheck(
    model: nn.Module,
    poses: Any,
    combination: CombinationLike = "mean",
    *,
    combination_options: Mapping[str, Any] | None = None,
    groups: Any = None,
    loss: CheckedLoss = sum_of_combined,
    **options: Unpack[OptionTypes],
) -> GradientCheck:
    """Compare two training steps of every accumulator with those of the full graph, on float64 copies of the model.

    Compared are the gradients of all parameters, of poses and of other leaves that the loss reaches; the values of
    parameters and buffers; attributes of modules and what is in them; the states of random generators. The model, its
    `.grad` and the global generators are left as they were.

    Gradients may differ by 1e-10 of their size, and by what the model itself rounds, if it computes in less than
    float64; see `gradient_errors` and `rounding_tolerances`.

    Args:
        model: The bare model.
        poses: A list of poses, a stacked tensor, a mapping of stacked tensors, or `Groups`; few enough for the full
            graph in float64.
        combination: As for `MultiPose`.
        combination_options: As for `MultiPose`.
        groups: The group of each pose, shape `(M,)`; by default the poses are one group.
        loss: Of a prediction; the sum of the combined prediction by default. With a second parameter it also gets the
            model, a copy: `loss=lambda prediction, model: prediction.combined.sum() + model.balance`.
        **options: Further options of `MultiPose`, for the accumulators that use them. `memory` counts in the last row.

    Raises:
        TypeError: The model cannot be copied, or its copy uses parameters of the original.
        ValueError: An option is out of range.
        PluginError: The combination is unknown, or `combination_options` do not fit it.
    """
    refuse_unknown_options(options, OPTION_NAMES)
    Options().changed(**options)  # what it refuses is no finding about the model
    chosen = registry.resolve_combination(combination, combination_options)
    batch = CheckedBatch(model, poses, chosen, groups, loss, options)
    # What functions in the model close over is not copied. A model that has not been initialized has no state.
    with nullcontext() if is_uninitialized(model) else preserved_state(model):
        try:
            return _check(batch)
        except NoGradientError:
            return GradientCheck((), (), NOTHING_TO_COMPARE)


def _check(batch: CheckedBatch, notes: Sequence[str] = ()) -> GradientCheck:
    """Compare in float64 or, if the full graph cannot run in it, in the dtype of the model."""
    trials = Trials(batch)
    try:
        try:
            steps = trials.full_graph()
        except (RuntimeError, ValueError) as error:
            if not batch.wide:
                raise
            why = "the full graph fails in float64: " + str(error).partition("\n")[0]
        else:
            narrowed = _narrowed(steps) if batch.wide else []
            if not narrowed:
                return _compare(trials, steps, notes, batch.options)
            why = f"its forward converts {narrowed[0]}"
    finally:
        trials.restore()
    return _check(replace(batch, wide=False), [f"compared in the model's own dtype, since {why}"])


def _narrowed(steps: list[StepRecord]) -> list[str]:
    """Return the parameters that a forward has converted from float64 to another dtype."""
    parameters = {name: value for name, value in steps[-1].contents.items() if name.startswith("parameter ")}
    return [
        name
        for name, content in parameters.items()
        if isinstance(content, TensorContent)
        and content.value.is_floating_point()
        and content.value.dtype != torch.float64
    ]


def _compare(
    trials: Trials, steps: list[StepRecord], notes: Sequence[str], options: Mapping[str, Any]
) -> GradientCheck:
    reference = full_graph_reference(trials, steps)
    if trials.draws and options.get("chunk_size") is None:
        options = {**options, "chunk_size": 1}  # a chunk draws other random numbers than its poses one by one
    settings = _settings(options) if reference.reason is None else []
    rows = tuple(_row(name, chosen, trials, reference) for name, chosen in settings)
    first = steps[0].gradients
    unused = tuple(name for name in trials.trainable if first[f"parameter {name}"] is None)
    return GradientCheck(rows, unused, reference.reason, (*notes, *reference.notes))


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


def _row(name: str, options: Mapping[str, Any], trials: Trials, reference: FullGraphReference) -> CheckedAccumulator:
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
    return CheckedAccumulator(name, largest, detached=tuple(_detached(steps, reference.steps)))


def _detached(steps: Sequence[StepRecord], expected: Sequence[StepRecord]) -> Iterator[str]:
    """Yield attributes that have a graph in the full graph only."""
    contents = steps[-1].contents
    for name, content in expected[-1].contents.items():
        actual = contents.get(name)
        if isinstance(content, TensorContent) and content.has_graph and not getattr(actual, "has_graph", False):
            yield name.removeprefix("attribute ")


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

"""Check that gradhooks trains a user's model as the full graph does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from typing_extensions import Unpack

from gradhooks import registry
from gradhooks.options import OPTION_NAMES, Options, OptionTypes, refuse_unknown_options
from gradhooks.profiling.check_result import TOLERANCE, CheckedAccumulator, GradientCheck
from gradhooks.profiling.content_differences import content_differences
from gradhooks.profiling.gradient_error import gradient_errors
from gradhooks.profiling.independent_copy import CheckedBatch, CheckedLoss
from gradhooks.profiling.precision import rounding_allowances
from gradhooks.profiling.preserved_state import preserved_state
from gradhooks.profiling.training_batch import CombinationLike
from gradhooks.profiling.training_steps import sum_of_combined, used_options
from gradhooks.profiling.trial import StepRecord, Trials

ACCUMULATORS = ("store", "stream", "recompute", "auto")
SCALE = 1 / 3  # of the loss of the second full graph; not a power of two, so that every operation rounds anew


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
    float64; see `gradient_errors` and `Precision`.

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
        trials, expected, notes = _run_full_graph(batch)
        try:
            return _compare(trials, expected, notes, options)
        finally:
            trials.restore()


def _run_full_graph(batch: CheckedBatch) -> tuple[Trials, list[StepRecord], list[str]]:
    """Run the full graph in float64 or, if the model cannot do that, in its own dtype."""
    trials = Trials(batch)
    try:
        return trials, trials.full_graph(), []
    except (RuntimeError, ValueError) as error:
        trials.restore()
        narrow = Trials(replace(batch, wide=False))
        try:
            expected = narrow.full_graph()
        except RuntimeError:
            narrow.restore()
            raise error from None
        first_line = str(error).partition("\n")[0]
        return narrow, expected, [f"compared in the model's own dtype, since it fails in float64: {first_line}"]


def _compare(
    trials: Trials, expected: list[StepRecord], notes: list[str], options: Mapping[str, Any]
) -> GradientCheck:
    repeated = trials.repeat_full_graph(expected, SCALE)
    allowances = [
        rounding_allowances(one.gradients, other.gradients, trials.eps)
        for one, other in zip(expected, repeated, strict=True)
    ]
    ignored = {
        difference.name
        for one, other in zip(repeated, expected, strict=True)
        for difference in content_differences(one.contents, other.contents, trials.eps)
    }
    if ignored:
        notes.append(f"not compared, since the full graph itself differs when it runs again: {', '.join(ignored)}")
    if trials.draws and options.get("chunk_size") is None:
        options = {**options, "chunk_size": 1}  # a chunk draws other random numbers than its poses one by one
    rows = []
    for name, chosen in _settings(options):
        try:
            actual = trials.multipose(**chosen)
        except Exception as error:
            rows.append(CheckedAccumulator(name, float("inf"), error=error))
            continue
        rows.append(_row(name, actual, expected, allowances, ignored, trials.eps))
    first = expected[0].gradients
    unused = tuple(name for name in trials.trainable if first[f"parameter {name}"] is None)
    reason = None
    if all(gradient is None for gradient in first.values()):
        reason = (
            "no leaf has a gradient in the full graph, so that nothing can be compared. Is the model frozen, by "
            "requires_grad_(False) or torch.jit.freeze, or does it compute without autograd?"
        )
    return GradientCheck(tuple(rows), unused, reason, tuple(notes))


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


def _row(
    name: str,
    actual: Sequence[StepRecord],
    expected: Sequence[StepRecord],
    allowances: Sequence[Mapping[str, float]],
    ignored: set[str],
    eps: float,
) -> CheckedAccumulator:
    largest, differences = 0.0, []
    for number, (one, other, allowance) in enumerate(zip(actual, expected, allowances, strict=True)):
        errors = gradient_errors(one.gradients, other.gradients, allowances=allowance, allowed=TOLERANCE)
        largest = max([largest, *errors.values()])
        wrong = sorted((name for name, error in errors.items() if not error <= TOLERANCE), key=errors.__getitem__)
        found = [_describe(name, errors[name], one, other) for name in reversed(wrong)]
        contents = content_differences(one.contents, other.contents, eps)
        found += [f"{name} {text}" for name, text in contents if name not in ignored]
        differences += [f"{text} (step {number + 1})" for text in found]
        if differences:
            break  # the second step starts from what the first one left
    return CheckedAccumulator(name, largest, tuple(differences))


def _describe(leaf: str, error: float, actual: StepRecord, expected: StepRecord) -> str:
    if expected.gradients[leaf] is None:
        return f".grad of {leaf} is there, and None in the full graph"
    if actual.gradients.get(leaf) is None:
        return f".grad of {leaf} is None"
    return f"gradient of {leaf} is off by {error:.1e} of its size"

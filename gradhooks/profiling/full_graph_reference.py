"""FullGraphReference: what the full graph leaves, and how exactly that can be told."""

from dataclasses import dataclass

from gradhooks.profiling.content_differences import content_differences
from gradhooks.profiling.gradient_error import Gradients, norm_of
from gradhooks.profiling.rounding import TOLERANCE, rounding_tolerances, trial_scale, unrepeatable_gradients
from gradhooks.profiling.step_record import StepRecord
from gradhooks.profiling.trial import Trials

SHOWN = 3  # names in a message
NOTHING_TO_COMPARE = (
    "no leaf has a gradient in the full graph, so that there is nothing to compare. Is the model frozen, by "
    "requires_grad_(False) or torch.jit.freeze, or does it compute without autograd? Poses that require grad make a "
    "frozen model comparable"
)


@dataclass(frozen=True)
class FullGraphReference:
    """What all accumulators are compared with.

    Attributes:
        steps: What the full graph left.
        tolerances: For each step, by gradient: an error that is no more than rounding.
        unstable: Contents that differ when the full graph itself runs again.
        eps: The rounding error of the narrowest dtype in the graph.
        reason: Why gradients cannot be compared, or None.
        notes: How it is compared, where that is not as usual.
    """

    steps: list[StepRecord]
    tolerances: list[dict[str, float]]
    unstable: frozenset[str]
    eps: float
    reason: str | None
    notes: list[str]


def full_graph_reference(trials: Trials, steps: list[StepRecord]) -> FullGraphReference:
    """Run the full graph again, and learn from that what of a difference is rounding, or chance.

    Args:
        trials: Run the full graph.
        steps: What it left the first time.
    """
    pairs = list(zip(steps, trials.repeat_full_graph(steps, trial_scale(trials.eps)), strict=True))
    tolerances = [rounding_tolerances(one.gradients, other.gradients, trials.eps) for one, other in pairs]
    unstable = [
        difference.name
        for one, other in pairs
        for difference in content_differences(other.contents, one.contents, trials.eps)
    ]
    notes = []
    if unstable:
        names = ", ".join(dict.fromkeys(unstable))
        notes.append(f"not compared, since the full graph itself differs when it runs again: {names}")
    tolerance = max(error for errors in tolerances for error in [TOLERANCE, *errors.values()])
    if tolerance > TOLERANCE:
        dtype = str(trials.narrowest).removeprefix("torch.")
        notes.append(
            f"gradients agree if they differ by no more than the rounding errors of {dtype}, as large as this model "
            f"makes them: {tolerance:.0e}"
        )
    reasons = [_reason(one.gradients, other.gradients, trials.eps) for one, other in pairs]
    reason = next((text for text in reasons if text), None)
    return FullGraphReference(steps, tolerances, frozenset(unstable), trials.eps, reason, notes)


def _reason(expected: Gradients, repeated: Gradients, eps: float) -> str | None:
    """Return why the gradients of a step cannot be compared."""
    if all(gradient is None for gradient in expected.values()):
        return NOTHING_TO_COMPARE
    nonfinite = [name for name, value in expected.items() if value is not None and norm_of(value) == float("inf")]
    if nonfinite:
        return f"in the full graph itself, gradients are not finite: {_shortened(nonfinite)}"
    unrepeatable = unrepeatable_gradients(expected, repeated, eps)
    if unrepeatable:
        return (
            "the full graph itself has other gradients when it runs again from the same state, so that there is "
            f"nothing to compare with: {_shortened(unrepeatable)}. Does the model seed itself anew, or read a clock?"
        )
    return None


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

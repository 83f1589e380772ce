"""Runs the checks: all at once, or one test each."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gradhooks import registry
from gradhooks.accumulators.base import Accumulator
from gradhooks.testing.check_accumulators import CHECKS as OF_ACCUMULATORS
from gradhooks.testing.check_derivatives import CHECKS as OF_DERIVATIVES
from gradhooks.testing.check_training import CHECKS as OF_TRAINING
from gradhooks.testing.check_values import CHECKS as OF_VALUES
from gradhooks.testing.errors import Check, ConformanceError, name_of

if TYPE_CHECKING:
    import pytest

COMBINATION_CHECKS: tuple[Check, ...] = (*OF_VALUES, *OF_DERIVATIVES, *OF_TRAINING)
ACCUMULATOR_CHECKS: tuple[Check, ...] = OF_ACCUMULATORS

State = Literal["passed", "failed", "expected failure", "unexpected pass"]


class CheckResult(NamedTuple):
    """What became of one check; `message` is the fault, or the reason why it was expected."""

    check: str
    state: State
    message: str = ""

    @property
    def good(self) -> bool:
        """Whether it went as it should."""
        return self.state in ("passed", "expected failure")


def checks_for(plugin: Any) -> tuple[Check, ...]:
    """The checks that concern a combination, or an accumulator."""
    return ACCUMULATOR_CHECKS if isinstance(plugin, Accumulator) else COMBINATION_CHECKS


def results(plugin: Any, expected_failures: Mapping[str, str] | None = None) -> Iterable[CheckResult]:
    """Run the checks one by one.

    Args:
        plugin: A combination or an accumulator.
        expected_failures: Reasons by the name of a check, beside those of the plugin's attribute of that name.

    Raises:
        ValueError: A check of that name does not exist.
    """
    reasons = _reasons(plugin, expected_failures)
    for check in checks_for(plugin):
        reason = reasons.get(check.__name__)
        try:
            check(plugin)
        except ConformanceError as fault:
            yield CheckResult(check.__name__, *(("expected failure", reason) if reason else ("failed", str(fault))))
        else:
            passed = f"{check.__name__}: {name_of(plugin)} passes, though it was expected to fail ({reason}); drop that"
            yield CheckResult(check.__name__, *(("unexpected pass", passed) if reason else ("passed", "")))


def check_combination(combination: Any, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Prove a combination: run every check.

    Predictions are drawn from a normal distribution, one number for each pose, unless the combination has a method
    `example(count)` that returns predictions of shape `(count, *prediction)`, or these and the arguments of the call.

    Args:
        combination: A `Combination` or any callable, or the name of an installed one.
        expected_failures: Reasons by the name of a check; an attribute `expected_failures` of the combination will do.

    Raises:
        ConformanceError: Some checks failed, or one that was expected to fail passed. The message has them all.
    """
    _prove(registry.combinations.resolve(combination), expected_failures)


def check_accumulator(accumulator: Any, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Prove an accumulator: run every check.

    Args:
        accumulator: An `Accumulator`, or the name of an installed one.
        expected_failures: As for `check_combination`.

    Raises:
        ConformanceError: As for `check_combination`.
    """
    _prove(registry.accumulators.resolve(accumulator), expected_failures)


def _prove(plugin: Any, expected_failures: Mapping[str, str] | None) -> None:
    bad = [result for result in results(plugin, expected_failures) if not result.good]
    if bad:
        messages = "\n".join(result.message for result in bad)
        raise ConformanceError(f"{len(bad)} of {len(checks_for(plugin))} checks failed\n{messages}")


def _reasons(plugin: Any, more: Mapping[str, str] | None) -> dict[str, str]:
    reasons = {**getattr(plugin, "expected_failures", {}), **(more or {})}
    known = [check.__name__ for check in checks_for(plugin)]
    for name, reason in reasons.items():
        if name not in known or not reason:
            raise ValueError(
                f"expected_failures of {name_of(plugin)}: {name!r} must be one of {', '.join(known)}, with a reason"
            )
    return reasons


def parametrize_with_checks(
    plugins: Iterable[Any], *, expected_failures: Mapping[str, str] | None = None
) -> "pytest.MarkDecorator":
    """A test for each plugin and check; declared failures become strict xfails.

    >>> @parametrize_with_checks(["mean", MyCombination()])
    ... def test_conformance(plugin, check):
    ...     check(plugin)

    Args:
        plugins: Combinations, accumulators, and names of installed combinations.
        expected_failures: As for `check_combination`, of all plugins.
    """
    import pytest  # noqa: PLC0415 - not a dependency of who only trains

    parameters = []
    for given in plugins:
        plugin = registry.combinations.resolve(given) if isinstance(given, str) else given
        name = given if isinstance(given, str) else name_of(given)
        reasons = _reasons(plugin, expected_failures)
        for check in checks_for(plugin):
            reason = reasons.get(check.__name__)
            expected = [pytest.mark.xfail(reason=reason, strict=True, raises=ConformanceError)] if reason else []
            parameters.append(pytest.param(plugin, check, id=f"{name}-{check.__name__}", marks=expected))
    return pytest.mark.parametrize(("plugin", "check"), parameters)

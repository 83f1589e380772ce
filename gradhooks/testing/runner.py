"""Run the conformance checks: one after the other, all at once, or as one test each."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gradhooks import registry
from gradhooks.accumulators.base import Accumulator
from gradhooks.testing.check_accumulators import CHECKS as OF_ACCUMULATORS
from gradhooks.testing.check_derivatives import CHECKS as OF_DERIVATIVES
from gradhooks.testing.check_groups import CHECKS as OF_GROUPS
from gradhooks.testing.check_training import CHECKS as OF_TRAINING
from gradhooks.testing.check_values import CHECKS as OF_VALUES
from gradhooks.testing.errors import Check, ConformanceError, name_of

if TYPE_CHECKING:
    import pytest

COMBINATION_CHECKS: tuple[Check, ...] = (*OF_VALUES, *OF_DERIVATIVES, *OF_GROUPS, *OF_TRAINING)
ACCUMULATOR_CHECKS: tuple[Check, ...] = OF_ACCUMULATORS

State = Literal["passed", "failed", "expected failure", "unexpected pass"]


class CheckResult(NamedTuple):
    """The outcome of one check; `message` is the failure, or the reason why it was expected."""

    check: str
    state: State
    message: str = ""

    @property
    def good(self) -> bool:
        """Whether the check passed, or failed as expected."""
        return self.state in ("passed", "expected failure")


def checks_for(plugin: Any) -> tuple[Check, ...]:
    """Return the checks for a combination or an accumulator."""
    return ACCUMULATOR_CHECKS if isinstance(plugin, Accumulator) else COMBINATION_CHECKS


def create_example(plugins: registry.Registry[Any], name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Create an installed plugin by name, with the `example_options` of its class if it has any.

    Args:
        plugins: `registry.combinations` or `registry.accumulators`.
        name: `name`, or `distribution:name`.
        options: Options that take the places of those of the class.

    Raises:
        PluginError: The plugin cannot be created, or has required options and no `example_options`.
    """
    return plugins.create(name, **{**getattr(plugins.load(name), "example_options", {}), **(options or {})})


def results(plugin: Any, expected_failures: Mapping[str, str] | None = None) -> Iterator[CheckResult]:
    """Run the checks one by one.

    Args:
        plugin: A combination or an accumulator.
        expected_failures: Reasons by the name of a check, in addition to the attribute `expected_failures` of the
            plugin.

    Raises:
        ValueError: `expected_failures` names an unknown check, or has an empty reason.
    """
    reasons = _reasons(plugin, expected_failures)
    for check in checks_for(plugin):
        reason = reasons.get(check.__name__)
        try:
            check(plugin)
        except ConformanceError as failure:
            yield CheckResult(check.__name__, *(("expected failure", reason) if reason else ("failed", str(failure))))
        else:
            unexpected = (
                f"{check.__name__}: {name_of(plugin)} passes, but was expected to fail ({reason}); remove this check "
                "from expected_failures"
            )
            yield CheckResult(check.__name__, *(("unexpected pass", unexpected) if reason else ("passed", "")))


def check_combination(combination: Any, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check on a combination.

    Predictions are drawn from a normal distribution, one number for each pose, unless the combination has a method
    `example(count)`, see `gradhooks.Combination`.

    Args:
        combination: A `Combination` or any callable, or the name of an installed one.
        expected_failures: Reasons by the name of a check, in addition to the attribute `expected_failures` of the
            combination.

    Raises:
        ConformanceError: Some checks failed, or one that was expected to fail passed. The message lists all of them.
    """
    _check(registry.combinations, combination, expected_failures)


def check_accumulator(accumulator: Any, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check on an accumulator.

    Args:
        accumulator: An `Accumulator`, or the name of an installed one.
        expected_failures: As for `check_combination`.

    Raises:
        ConformanceError: As for `check_combination`.
    """
    _check(registry.accumulators, accumulator, expected_failures)


def _check(plugins: registry.Registry[Any], plugin: Any, expected_failures: Mapping[str, str] | None) -> None:
    plugin = create_example(plugins, plugin) if isinstance(plugin, str) else plugins.resolve(plugin)
    bad = [result for result in results(plugin, expected_failures) if not result.good]
    if bad:
        messages = "\n".join(result.message for result in bad)
        raise ConformanceError(f"{len(bad)} of {len(checks_for(plugin))} checks failed\n{messages}")


def _reasons(plugin: Any, additional: Mapping[str, str] | None) -> dict[str, str]:
    reasons = {**getattr(plugin, "expected_failures", {}), **(additional or {})}
    known = [check.__name__ for check in checks_for(plugin)]
    for name, reason in reasons.items():
        if name not in known or not reason:
            raise ValueError(
                f"expected_failures of {name_of(plugin)}: got {name!r}: {reason!r}; the name must be one of "
                f"{', '.join(known)}, with a reason"
            )
    return reasons


def parametrize_with_checks(
    plugins: Iterable[Any], *, expected_failures: Mapping[str, str] | None = None
) -> "pytest.MarkDecorator":
    """Create a test for each plugin and check; expected failures become strict xfails.

    >>> @parametrize_with_checks(["mean", MyCombination()])
    ... def test_conformance(plugin, check):
    ...     check(plugin)

    Args:
        plugins: Combinations, accumulators, and names of installed combinations.
        expected_failures: As for `check_combination`, for all plugins.
    """
    import pytest  # noqa: PLC0415 - not a dependency for those who only train

    parameters = []
    for plugin_or_name in plugins:
        by_name = isinstance(plugin_or_name, str)
        plugin = create_example(registry.combinations, plugin_or_name) if by_name else plugin_or_name
        name = plugin_or_name if by_name else name_of(plugin)
        reasons = _reasons(plugin, expected_failures)
        for check in checks_for(plugin):
            reason = reasons.get(check.__name__)
            marks = [pytest.mark.xfail(reason=reason, strict=True, raises=ConformanceError)] if reason else []
            parameters.append(pytest.param(plugin, check, id=f"{name}-{check.__name__}", marks=marks))
    return pytest.mark.parametrize(("plugin", "check"), parameters)

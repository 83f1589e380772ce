"""Tools for testing plugins and training code: the full graph as reference, and the conformance kit."""

from gradhooks.testing.errors import ConformanceError
from gradhooks.testing.reference import full_graph
from gradhooks.testing.runner import (
    ACCUMULATOR_CHECKS,
    COMBINATION_CHECKS,
    CheckResult,
    check_accumulator,
    check_combination,
    checks_for,
    create_example,
    parametrize_with_checks,
    results,
)

__all__ = [
    "ACCUMULATOR_CHECKS",
    "COMBINATION_CHECKS",
    "CheckResult",
    "ConformanceError",
    "check_accumulator",
    "check_combination",
    "checks_for",
    "create_example",
    "full_graph",
    "parametrize_with_checks",
    "results",
]

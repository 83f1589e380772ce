"""The conformance kit: proves a combination or an accumulator, a stranger's or a built-in."""

from gradhooks.conformance.failure import ConformanceError
from gradhooks.conformance.kit import (
    ACCUMULATOR_CHECKS,
    COMBINATION_CHECKS,
    CheckResult,
    check_accumulator,
    check_combination,
    checks_for,
    parametrize_with_checks,
    results,
)
from gradhooks.conformance.oracle import full_graph

__all__ = [
    "ACCUMULATOR_CHECKS",
    "COMBINATION_CHECKS",
    "CheckResult",
    "ConformanceError",
    "check_accumulator",
    "check_combination",
    "checks_for",
    "full_graph",
    "parametrize_with_checks",
    "results",
]

"""What tests of a plugin, or of training with gradhooks, need: the oracle and the conformance kit."""

from gradhooks.testing.errors import ConformanceError
from gradhooks.testing.reference import full_graph
from gradhooks.testing.runner import (
    ACCUMULATOR_CHECKS,
    COMBINATION_CHECKS,
    CheckResult,
    check_accumulator,
    check_combination,
    checks_for,
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
    "full_graph",
    "parametrize_with_checks",
    "results",
]

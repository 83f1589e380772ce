"""What tests of a plugin, or of training with gradhooks, need: the oracle and the conformance kit."""

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

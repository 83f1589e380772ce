"""Faults at any operator and any line, and signals, leave nothing behind; `fault_injection.py` injects more of them."""

import pytest
from fault_injection import inject_many


@pytest.mark.parametrize("seed", range(2))
def test_faults_leave_nothing_behind(seed: int) -> None:
    counts, failures = inject_many(30, seed, kinds=("operator", "line"))
    assert failures == []
    assert counts["operator"] + counts["line"] > 20

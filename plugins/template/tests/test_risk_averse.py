from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradhooks_template import RiskAverse

from gradhooks.testing import parametrize_with_checks


@parametrize_with_checks(["risk_averse", RiskAverse(risk=2.0)])
def test_conformance(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


def test_formula() -> None:
    assert RiskAverse(risk=0.5)(torch.tensor([1.0, 3.0])).item() == pytest.approx(1.5)

"""A combination for gradhooks."""

from gradhooks_template.risk_averse import RiskAverse

__all__ = ["RiskAverse"]

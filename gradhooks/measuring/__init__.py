"""Tools that show, on the user's own model, what gradhooks costs, needs and gives."""

from gradhooks.measuring.check import Proof, check
from gradhooks.measuring.compare import Comparison, Row, compare
from gradhooks.measuring.plan import Plan, plan
from gradhooks.measuring.table import table

__all__ = ["Comparison", "Plan", "Proof", "Row", "check", "compare", "plan", "table"]

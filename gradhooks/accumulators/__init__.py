"""The built-in accumulators, found through the same entry points as a stranger's."""

from gradhooks.accumulators.auto import Auto
from gradhooks.accumulators.base import Accumulation, Accumulator, Coefficients
from gradhooks.accumulators.recompute import Recompute
from gradhooks.accumulators.store import Store
from gradhooks.accumulators.stream import Stream

__all__ = ["Accumulator", "Auto", "Coefficients", "Accumulation", "Recompute", "Store", "Stream"]

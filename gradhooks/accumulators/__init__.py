"""The built-in accumulators, registered through the same entry points as those of a plugin, and their contract."""

from gradhooks.accumulators.auto import Auto
from gradhooks.accumulators.base import Accumulator, Engine
from gradhooks.accumulators.recompute import Recompute
from gradhooks.accumulators.store import Store
from gradhooks.accumulators.stream import Stream
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients

__all__ = [
    "Accumulation",
    "Accumulator",
    "Auto",
    "Chunk",
    "Coefficients",
    "Engine",
    "Recompute",
    "Store",
    "Stream",
]

"""The built-in combinations, registered through the same entry points as plugins."""

from gradhooks.combinations.boltzmann import Boltzmann
from gradhooks.combinations.logsumexp import Max, Min
from gradhooks.combinations.mean import Mean
from gradhooks.combinations.pooling import Pooling

__all__ = ["Boltzmann", "Max", "Mean", "Min", "Pooling"]

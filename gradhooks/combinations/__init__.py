"""The built-in combinations, found through the same entry points as a stranger's."""

from gradhooks.combinations.boltzmann import Boltzmann
from gradhooks.combinations.logsumexp import Max, Min
from gradhooks.combinations.mean import Mean

__all__ = ["Boltzmann", "Max", "Mean", "Min"]

"""Models that nobody here wrote, of tiny size and with random weights: they find what no model of our own has."""

from strangers import graphs, language, vision  # noqa: F401 - each registers its models
from strangers.entry import STRANGERS, Stranger, build_stranger

__all__ = ["STRANGERS", "Stranger", "build_stranger"]

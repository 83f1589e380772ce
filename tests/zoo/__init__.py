"""Models named by the edge case that each is, with the poses that they eat."""

from zoo import checkpointed, derivatives, graphs, inputs, layers, reparametrised, sharing, stateful, wrapped
from zoo.kit import MOST_POSES, ZOO, Place, Species, Specimen, build, mlp

__all__ = [
    "MOST_POSES",
    "ZOO",
    "Place",
    "Species",
    "Specimen",
    "build",
    "checkpointed",
    "derivatives",
    "graphs",
    "inputs",
    "layers",
    "mlp",
    "reparametrised",
    "sharing",
    "stateful",
    "wrapped",
]

"""Models named by the edge case that each is, with the poses that they eat."""

from model_zoo import (
    checkpointed,
    derivatives,
    graphs,
    inputs,
    layers,
    reparametrised,
    shared_tensors,
    stateful,
    wrapped,
)
from model_zoo.specimen import MOST_POSES, ZOO, Place, Species, Specimen, build, mlp

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
    "shared_tensors",
    "stateful",
    "wrapped",
]

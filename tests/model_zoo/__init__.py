"""Small models, each named by the edge case that it represents, with their poses."""

from model_zoo import (
    checkpointed,
    derivatives,
    graphs,
    inputs,
    layers,
    parametrized,
    shared_tensors,
    stateful,
    wrapped,
)
from model_zoo.model_case import MOST_POSES, ZOO, ModelCase, TensorFactory, ZooEntry, build, mlp

__all__ = [
    "MOST_POSES",
    "ZOO",
    "ModelCase",
    "TensorFactory",
    "ZooEntry",
    "build",
    "checkpointed",
    "derivatives",
    "graphs",
    "inputs",
    "layers",
    "mlp",
    "parametrized",
    "shared_tensors",
    "stateful",
    "wrapped",
]

"""Train on groups of poses with the memory of one, and the gradient of all.

>>> import torch, gradhooks
>>> scorer = gradhooks.MultiPose(torch.nn.Linear(3, 1), "min")
>>> combined, poses = scorer([torch.randn(3) for _ in range(100)])
>>> combined.square().sum().backward()
"""

from importlib.metadata import PackageNotFoundError, version

from loguru import logger

from gradhooks import accumulators, combinations, registry
from gradhooks.combination import Combination, GradientCombination, StreamWeights
from gradhooks.decorator import multipose
from gradhooks.errors import (
    CombinationError,
    ConcurrentUseError,
    DistributedError,
    GradhooksError,
    GradhooksWarning,
    HigherOrderError,
    PluginError,
    PosesError,
    PredictionError,
    ReplayError,
    UnregisteredTensorError,
)
from gradhooks.measuring import check, compare, plan
from gradhooks.multipose import MultiPose
from gradhooks.prediction import MultiPosePrediction
from gradhooks.report import GroupReport

__all__ = [
    "Combination",
    "CombinationError",
    "ConcurrentUseError",
    "DistributedError",
    "GradhooksError",
    "GradhooksWarning",
    "GradientCombination",
    "GroupReport",
    "HigherOrderError",
    "MultiPose",
    "MultiPosePrediction",
    "PluginError",
    "PosesError",
    "PredictionError",
    "ReplayError",
    "StreamWeights",
    "UnregisteredTensorError",
    "accumulators",
    "check",
    "combinations",
    "compare",
    "multipose",
    "plan",
    "registry",
]

try:
    __version__ = version("gradhooks")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

logger.disable("gradhooks")

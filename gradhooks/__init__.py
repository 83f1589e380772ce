"""Train on groups of poses with the memory of one pose, and the gradient of the full graph.

>>> import torch, gradhooks
>>> scorer = gradhooks.MultiPose(torch.nn.Linear(3, 1), "min")
>>> combined, per_pose = scorer([torch.randn(3) for _ in range(100)])
>>> combined.square().sum().backward()
"""

from importlib.metadata import PackageNotFoundError, version

from loguru import logger

from gradhooks import accumulators, combinations, errors, group_reductions, registry, testing
from gradhooks.accumulators import Accumulator
from gradhooks.collation import collate_groups
from gradhooks.combination import Combination, GradientCombination, StreamWeights
from gradhooks.combined import Combined
from gradhooks.decorator import multipose
from gradhooks.engine.report import Report
from gradhooks.groups import Groups
from gradhooks.prediction import MultiPosePrediction
from gradhooks.profiling.comparison import compare
from gradhooks.profiling.gradient_check import gradcheck
from gradhooks.profiling.memory_estimate import estimate_memory
from gradhooks.wrapper import MultiPose

__all__ = [
    "Accumulator",
    "Combination",
    "Combined",
    "GradientCombination",
    "Groups",
    "MultiPose",
    "MultiPosePrediction",
    "Report",
    "StreamWeights",
    "accumulators",
    "collate_groups",
    "combinations",
    "compare",
    "errors",
    "estimate_memory",
    "gradcheck",
    "group_reductions",
    "multipose",
    "registry",
    "testing",
]

try:
    __version__ = version("gradhooks")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

logger.disable("gradhooks")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

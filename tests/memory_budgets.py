"""Poses in ragged groups for tests, and budgets in shares of the memory that they need."""

import functools

import torch
from chosen_device import DEVICE
from seeding import manual_seed
from small_model import small_mlp
from torch import Tensor

import gradhooks

GROUPS = [2, 0, 2, 1, 0, 3, 2, 2, 0, 1, 2] * 2
"""Ragged and in no order."""
COUNT = len(GROUPS)
SHARES = [0, 0.2, 0.5, 0.7, 0.9, 1.0, 2.0]
"""Budgets from nothing to plenty, as shares of what the graphs of all poses need."""


def rows(count: int = COUNT) -> Tensor:
    manual_seed(4)
    return torch.randn(count, 4, dtype=torch.float64).to(DEVICE)


@functools.cache
def graph_bytes() -> int:
    """Return what the graphs of all poses of the small model need."""
    scorer = gradhooks.MultiPose(small_mlp())
    prediction = scorer(list(rows()))
    del prediction
    return scorer.report.memory.used

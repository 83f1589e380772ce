"""Lazy modules, whose parameters get their shapes in a first forward."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradhooks.engine.training_flags import with_training_flags


def initialize_lazy_parameters(model: nn.Module, run_first_pose: Callable[[], object]) -> None:
    """Run one forward if the model has lazy parameters or buffers, since shadows need the shapes.

    The forward runs in eval mode, in which dropout draws nothing and running statistics stay. The poses then find the
    state that a first plain forward leaves after its own initialization.
    """
    if any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        with with_training_flags((module, False) for module in model.modules()), torch.no_grad():
            run_first_pose()

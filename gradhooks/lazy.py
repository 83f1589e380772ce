"""Lazy modules: parameters that wait for a first forward to know their shape."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def initialise_lazy(model: nn.Module, run_first_pose: Callable[[], object]) -> None:
    """Run one forward if parameters or buffers still wait for it; a shadow needs something to be the shadow of.

    It is run in eval mode, in which dropout draws nothing and statistics stay: the poses then find the state that the
    first of plain forwards would have found after its own initialisation.
    """
    if not any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            run_first_pose()
    finally:
        for module, training in modes:
            module.training = training

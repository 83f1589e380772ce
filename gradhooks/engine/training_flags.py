"""Training flags of modules, and lazy modules, whose parameters wait for a first forward to know their shape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Modes = list[tuple[nn.Module, bool]]


def modes_of(model: nn.Module) -> Modes:
    """The training flag of each module."""
    return [(module, module.training) for module in model.modules()]


@contextmanager
def in_modes(modes: Modes) -> Iterator[None]:
    """Set training flags, and put them back at the end."""
    before = [(module, module.training) for module, training in modes if module.training != training]
    try:
        for module, training in before:
            module.training = not training
        yield
    finally:
        for module, training in before:
            module.training = training


def initialise_lazy(model: nn.Module, run_first_pose: Callable[[], object]) -> None:
    """Run one forward if parameters or buffers still wait for it; a shadow needs something to be the shadow of.

    It is run in eval mode, in which dropout draws nothing and statistics stay: the poses then find the state that the
    first of plain forwards would have found after its own initialisation.
    """
    if any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        with in_modes([(module, False) for module in model.modules()]), torch.no_grad():
            run_first_pose()

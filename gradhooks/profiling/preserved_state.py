"""Run trial steps without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gradhooks.engine.model_state import ModelState


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore `.grad`, buffers and random state of `model` at the end of the block."""
    gradients = [parameter.grad for parameter in model.parameters()]
    try:
        with ModelState(model).preserved():
            yield
    finally:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient

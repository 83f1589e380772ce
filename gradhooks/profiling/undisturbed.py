from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gradhooks.engine.model_state import ModelState


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Try things out on a model: its `.grad`, buffers and the random state are afterwards what they were."""
    gradients = [parameter.grad for parameter in model.parameters()]
    try:
        with ModelState(model).preserved():
            yield
    finally:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient

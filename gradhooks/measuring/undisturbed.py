from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gradhooks.replay import Replay


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Try things out on a model: its `.grad`, buffers and the random state are afterwards what they were."""
    gradients = [parameter.grad for parameter in model.parameters()]
    try:
        with Replay(model).undone():
            yield
    finally:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient

"""GradientObserver: what the steps that are timed make of the gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from gradhooks.engine.model_state import ModelState
from gradhooks.profiling.gradient_error import gradient_error


class GradientObserver:
    """Compares the gradients of the timed steps with those of the first step of the same round.

    Attributes:
        errors: The largest error of each step so far; see `gradient_error`.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.errors = [0.0] * steps
        self._model = model
        self._expected: list[Tensor | None] = []

    @contextmanager
    def around(self, index: int) -> Iterator[None]:
        """Run a step in this block: from the state that all others find, with the same random numbers."""
        with ModelState(self._model).preserved():
            yield
        gradients = [leaf.grad for leaf in self._model.parameters()]
        if index == 0:
            self._expected = gradients
        self.errors[index] = max(self.errors[index], gradient_error(gradients, self._expected))

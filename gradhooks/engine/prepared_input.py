"""PreparedInput: the model's input for a chunk whose size is looked at before the chunk runs."""

from collections.abc import Callable
from typing import Any

from gradhooks.engine.nested import tensors_in


class PreparedInput:
    """The model's input for one chunk, made before the chunk runs and taken once: a model may change it."""

    def __init__(self) -> None:
        self._range: tuple[int, int] | None = None
        self._input: Any = None

    def make(self, start: int, stop: int, make: Callable[[], Any]) -> int:
        """Make the input of a chunk, and return its bytes."""
        self._range, self._input = None, None  # frees the input of another chunk first
        self._input = make()
        self._range = (start, stop)
        return sum(tensor.nbytes for _, tensor in tensors_in(self._input))

    def take(self, start: int, stop: int, make: Callable[[], Any]) -> Any:
        """Return the input of a chunk, made now if it was not made before."""
        taken = self._input if self._range == (start, stop) else make()
        self._range, self._input = None, None
        return taken

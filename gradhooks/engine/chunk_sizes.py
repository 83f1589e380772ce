"""ChunkSizes: how many poses go through the model at once; a fixed number, or as many as fit.

Rules:
    1. "auto" measures what two poses need and starts with as many as fit in half of the free memory, since the backward
       may need as much again. A group that runs out of memory starts again with chunks of half the size, from the state
       before it. No chunk has to be undone, and nothing is copied in case one must be.
    2. After running out of memory the smaller size is kept and never grows, which leaves room for the user's own code.
    3. A size that is used for the first time goes through a backward in the first chunk, whatever the accumulator, so
       that it fails there and not in the second run, which cannot always choose its chunks.
"""

from collections.abc import Callable, Container
from typing import TypeVar

import torch
from loguru import logger
from torch import Tensor

from gradhooks.engine.learned import ChunkSizeState
from gradhooks.engine.memory_budget import free_bytes, ran_out_of_memory
from gradhooks.engine.saved_tensors import record_saved_tensors
from gradhooks.options import ChunkSize

Result = TypeVar("Result")

SHARE_OF_FREE_MEMORY = 0.5  # Rule 1


class ChunkSizes:
    """The chunk sizes of one group.

    Args:
        option: The option `chunk_size`.
        state: What earlier groups have shown about `"auto"`.
    """

    def __init__(self, option: ChunkSize, state: ChunkSizeState) -> None:
        self._option = option
        self._state = state
        self._last = 0

    @property
    def automatic(self) -> bool:
        """Whether a smaller size may be tried after running out of memory."""
        return self._option == "auto"

    @property
    def needs_measuring(self) -> bool:
        """Whether the memory of the first poses must be measured."""
        return self.automatic and self._state.size is None

    def measure(self, run: Callable[[int], Tensor], count: int, excluded: Container[int]) -> None:
        """Learn what a pose needs (Rule 1). The caller restores the model state.

        Args:
            run: Runs the given number of poses, from the first on.
            count: The number of poses. Two are run if there are, since a normalization over the batch refuses one.
            excluded: Addresses of storages that do not count.
        """
        measured = min(2, count)
        try:
            with torch.enable_grad(), record_saved_tensors(excluded) as saved:
                predictions = run(measured)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            self._state.size = 1
            return
        needed = sum(saved.values()) + predictions.nbytes
        self._state.size = max(1, int(SHARE_OF_FREE_MEMORY * free_bytes(predictions.device) * measured / needed))
        logger.debug("{} poses need {} bytes: chunks of up to {} poses", measured, needed, self._state.size)

    def next(self, remaining: int) -> int:
        """Return the size of the next chunk, if `remaining` poses are left."""
        if self._option != "auto":
            return min(self._option, remaining)
        self._last = min(self._state.size or 1, remaining)
        return self._last

    def is_unproven(self, count: int) -> bool:
        """Return whether `count` poses at once have not yet gone through forward and backward (Rule 3)."""
        return self.automatic and count > self._state.proven

    def mark_proven(self, count: int) -> None:
        """Record that `count` poses at once went through forward and backward."""
        self._state.proven = max(self._state.proven, count)

    def retry_smaller(self, attempt: Callable[[], Result], *, resizable: bool = True) -> Result:
        """Return the result of `attempt`; after running out of memory, halve the size and call it again.

        Args:
            attempt: A function that asks for sizes and leaves no trace if it raises.
            resizable: Whether `attempt` uses the sizes. If not, only later groups benefit.

        Raises:
            RuntimeError: The memory runs out with one pose, or with a fixed size.
        """
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not (ran_out_of_memory(error) and self._halve() and resizable):
                    raise
            # The frames of the failed attempt, and their tensors, are released here.
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _halve(self) -> bool:
        """Halve the size that was used last; return False if it was 1 or fixed."""
        if not self.automatic or self._last <= 1:
            return False
        state = self._state
        state.size = (self._last + 1) // 2
        state.proven = min(state.proven, state.size)
        logger.debug("out of memory with {} poses at once: continuing with {}", self._last, state.size)
        return True

"""ChunkSizes: how many poses go through the model at once; fixed, or as many as fit.

Rules:
    1. "auto" runs two poses for a look at what they need, and begins with as many as fit in half of what is free: a
       backward may need as much again. A group that runs out of memory is begun again with chunks half as large, from
       the state before it: no chunk has to be taken back, and nothing is copied in case one must.
    2. What went wrong once is not tried again: the size is remembered, and never grows. Filling the memory to the brim
       would only let the user's own code fail.
    3. The first chunk of a group has a graph. Where the size is new it goes through a backward, whatever the
       accumulator, so that it fails there, and not in a replay that may have no choice of its chunks.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from loguru import logger
from torch import Tensor

from gradhooks.engine.memory import free_bytes, noting_saved

ChunkSize = int | Literal["auto"]
Result = TypeVar("Result")

# Of what is free (rule 1).
SHARE = 0.5


@dataclass
class ChunkSizeState:
    """What was found, from group to group.

    Attributes:
        size: As many poses may go through at once; None before the first group.
        proven: As many went forward and backward.
        mixes: Whether predictions depend on what else is in their chunk.
        in_vain: How many groups in a row no pose reached a parameter, by its name, though all were looked at.
    """

    size: int | None = None
    proven: int = 0
    mixes: bool = False
    in_vain: dict[str, int] = field(default_factory=dict)


@dataclass
class ChunkSizes:
    """The sizes for one group.

    Attributes:
        with_graph: Poses in a chunk with a graph.
        graphless: Poses in a chunk without.
        experience: Where "auto" looks up what fits, and notes what does not.
    """

    with_graph: ChunkSize = 1
    graphless: ChunkSize = 1
    experience: ChunkSizeState = field(default_factory=ChunkSizeState)
    _asked: int = 0

    @property
    def automatic(self) -> bool:
        """Whether running out of memory is not the end."""
        return "auto" in (self.with_graph, self.graphless)

    @property
    def unknown(self) -> bool:
        """Whether the first poses must be measured."""
        return self.automatic and self.experience.size is None

    def measure(self, run: Callable[[int], Tensor], count: int, known: Container[int]) -> None:
        """Rule 1: learn what a pose needs. Its state is the caller's to put back.

        Args:
            run: Runs the first so many poses.
            count: N. Two are run where there are, since a normalisation over the batch refuses one.
            known: Storages that are there anyway.
        """
        few = min(2, count)
        try:
            with torch.enable_grad(), noting_saved(known) as saved:
                predictions = run(few)
        except (RuntimeError, MemoryError) as fault:
            if not ran_out_of_memory(fault):
                raise
            self.experience.size = 1
            return
        needed = sum(saved.values()) + predictions.nbytes
        self.experience.size = max(1, int(SHARE * free_bytes(predictions.device) * few / needed))
        logger.debug("{} poses need {} bytes: up to {} at once", few, needed, self.experience.size)

    def next(self, remaining: int, *, with_graph: bool) -> int:
        """How many of the `remaining` poses go through next."""
        size = self.with_graph if with_graph else self.graphless
        if size != "auto":
            self._asked = 0
            return min(size, remaining)
        self._asked = min(self.experience.size or 1, remaining)
        return self._asked

    def is_new(self, count: int) -> bool:
        """Rule 3: whether nobody knows yet that `count` poses can go through forward and backward."""
        return self.with_graph == "auto" and count > self.experience.proven

    def proved(self, count: int) -> None:
        """`count` poses went forward and backward."""
        self.experience.proven = max(self.experience.proven, count)

    def until_they_fit(self, attempt: Callable[[], Result], *, in_any_chunks: bool = True) -> Result:
        """The result of `attempt`, which asks for sizes, leaves no trace where it fails, and may be called again.

        Args:
            attempt: What may run out of memory.
            in_any_chunks: Whether it will go by the sizes that it is told. Else only later groups will.

        Raises:
            RuntimeError: The memory runs out with one pose, or with a fixed number.
        """
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as fault:
                if not (ran_out_of_memory(fault) and self.halve() and in_any_chunks):
                    raise
            # Here nothing holds the frames of the failure, and with them the tensors, any more.
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def halve(self) -> bool:
        """What was asked for last did not fit; returns whether fewer can be tried."""
        if self._asked <= 1:
            return False
        self.experience.size = (self._asked + 1) // 2
        self.experience.proven = min(self.experience.proven, self.experience.size)
        logger.debug("out of memory with {} poses at once: on with {}", self._asked, self.experience.size)
        return True


def ran_out_of_memory(fault: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on whatever device and by whatever library."""
    if isinstance(fault, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = ("DefaultCPUAllocator", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(fault, RuntimeError) and any(words in str(fault) for words in said)

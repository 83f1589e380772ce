"""Schedule: which poses of a batch run plainly, on the real parameters, and how many poses run at once.

Rules:
    1. A step may need the allowed memory and the step of one pose: a graph of g bytes and temporary tensors of t. All M
       poses run plainly if M graphs fit, and temporary tensors for each pose of a chunk: in one chunk, else in smaller
       ones. If they do not fit, as many of the last poses as fit beside one copy of the gradients: their graphs are
       freed in the backward before the first second run begins. Smaller chunks cost more launches of operators, larger
       ones leave less memory to graphs, and a pose whose graph does not fit costs `SECOND_RUN` of a step more.
    2. Intercepted poses run in chunks whose graphs fit beside two copies: the sum, and what plain chunks have added.
       The longer the poses of a chunk, the fewer they are (`chunk_fitting.py`).
    3. What earlier batches hold until their backward is not allowed a second time.
    4. A batch that runs out of memory starts again from the state before it, with half of the memory that it was
       using, and chunks of half the size. Both stay small, which leaves room for the user's own code.
    5. No decision depends on time.
"""

from collections.abc import Callable
from math import isqrt
from typing import TypeVar

import torch
from loguru import logger

from gradhooks.engine.learned import Learned
from gradhooks.engine.memory_budget import memory_in_bytes, ran_out_of_memory
from gradhooks.engine.memory_need import HooksRefusedError, MemoryNeed
from gradhooks.engine.open_graphs import OpenGraphs
from gradhooks.engine.report import MemoryUse
from gradhooks.numerics import even_size
from gradhooks.units import format_bytes

PARTS = 8
"""A plain chunk of several takes at least this part of the memory (Rule 1)."""
SECOND_RUN = 0.25
"""Rule 1. This is what a forward without a graph costs, in steps."""

Result = TypeVar("Result")


class StartAgainError(Exception):
    """Internal: something was learned with which the batch has to start again, from the state before it."""


class Schedule:
    """The sizes of one batch.

    Args:
        memory: The option `memory`.
        chunk_size: The option `chunk_size`.
        batched: Whether several poses can run at once.
        need: The memory of a pose.
        gradient_bytes: One copy of the gradients.
        open_graphs: What earlier batches hold when this one begins.
        learned: What earlier batches have shown.
        device: The device of the model.
    """

    def __init__(
        self,
        memory: str | float,
        chunk_size: int | None,
        *,
        batched: bool,
        need: MemoryNeed,
        gradient_bytes: int,
        open_graphs: OpenGraphs,
        learned: Learned,
        device: torch.device,
    ) -> None:
        self._chunk_size = chunk_size
        self._batched = batched
        self._gradient_bytes = gradient_bytes
        self._open_graphs = open_graphs
        self._held = open_graphs.bytes
        self._learned = learned
        self.need = need
        if learned.memory_limit is None or learned.memory_limit[0] != memory:
            learned.memory_limit = (memory, memory_in_bytes(memory, device))
        self._memory_option = memory
        self._last_chunk = self._plain_chunk = 1
        self._planned = 0
        self.one_by_one = False
        self._splits_chunks = False

    @property
    def limit(self) -> int:
        """The bytes that the option allows, less after running out of memory."""
        return 0 if self._learned.memory_limit is None else self._learned.memory_limit[1]

    @property
    def left(self) -> int:
        """The bytes that this batch may use: the limit without what earlier batches hold."""
        return max(0, self.limit - self._held)

    @property
    def use(self) -> MemoryUse:
        """What is allowed, and what this batch holds now until its backward."""
        return MemoryUse(self.limit, max(0, self._open_graphs.bytes - self._held))

    @property
    def room(self) -> int:
        """The bytes that this batch may need: what is left, and the step of one pose."""
        return max(0, self.limit + self.need.step_bytes - self._held)

    @property
    def graph_room(self) -> int:
        """The bytes that the graphs of plain chunks may keep."""
        return self.room - self._plain_chunk * self.need.temporary_bytes

    @property
    def needs_measuring(self) -> bool:
        """Whether it must be measured what a pose needs, before anything can be planned."""
        return self.need.known is None and self.left > 0

    def first_plain(self, count: int) -> int:
        """Return the index of the first of `count` poses that runs plainly; those before are intercepted (Rule 1)."""
        graph = self.need.graph_bytes
        if self._all_fit(count, count) or self._all_fit(count, self._plain_part()):
            self._planned = count * graph
            return 0
        plain = min(count - 1, max(0, self.graph_room - self._gradient_bytes) // graph)
        self._planned = plain * graph
        size = self._chunk_size or 1  # chunks of a fixed size begin at its multiples
        return min(count, -(-(count - plain) // size) * size)

    def _all_fit(self, count: int, fitting: int) -> bool:
        """Return whether the graphs of all poses fit if `fitting` of them may run at once."""
        self._plain_chunk = self._capped(fitting, count)
        return count * self.need.graph_bytes <= self.graph_room

    def _plain_part(self) -> int:
        """Return the size of plain chunks if the poses are more than one.

        With room for P graphs of g bytes, temporary tensors of t bytes and an overhead of o poses, chunks of n poses
        cost `P o / n` in launches, and `SECOND_RUN n t / g` for poses whose graphs do not fit: least for the n below.
        """
        need, room = self.need, self.room
        graphs, temporary = room / need.graph_bytes, max(1, need.temporary_bytes)
        cheapest = isqrt(int(graphs * need.chunk_overhead * need.graph_bytes / (SECOND_RUN * temporary)))
        return max(room // (PARTS * need.step_bytes), min(cheapest, room // (2 * need.step_bytes)))

    def split_beyond(self, room: int) -> int | None:
        """Return beyond which need a chunk is split, given the bytes left; None if chunks have a fixed size."""
        return max(0, room) if self._chunk_size is None else None

    def plain_chunk_size(self, remaining: int) -> int:
        """Return the size of the next plain chunk."""
        return self._capped(self._plain_chunk, remaining)

    def prediction_chunk_size(self, remaining: int) -> int:
        """Return the size of the next chunk of a batch that has no backward."""
        size = self._capped(self.room // self.need.step_bytes, remaining)
        self._planned = size * self.need.step_bytes
        return size

    def chunk_size(self, remaining: int, pose_bytes: int = 0, *, longest: int | None = None) -> int:
        """Return the size of the next intercepted chunk (Rule 2).

        Args:
            remaining: How many poses are left.
            pose_bytes: The bytes of the chunk's input for each pose; 0 for those of the largest input.
            longest: How many poses it has at most. If they do not fit, they are shared evenly over several chunks.
        """
        step_bytes = self.need.step_bytes_of(pose_bytes)
        size = self._capped(self._fitting(step_bytes, pose_bytes), remaining if longest is None else longest)
        self._planned = max(self._planned, size * step_bytes)
        return size if longest is None else even_size(longest, size)

    def may_run_again(self, count: int, pose_bytes: int) -> bool:
        """Return whether a chunk that ran without a graph may run with one; the arguments are those of the chunk."""
        return count <= self._size(self._fitting(self.need.step_bytes_of(pose_bytes), pose_bytes), count)

    @property
    def depends_on_lengths(self) -> bool:
        """Whether the size of a chunk follows the sizes of its poses."""
        return self._chunk_size is None and self._batched and not self.one_by_one and self.need.known is not None

    def _fitting(self, step_bytes: int, pose_bytes: int) -> int:
        """Return how many poses fit whose step needs `step_bytes`; `pose_bytes` is 0 for those of the largest input."""
        largest = self.need.step_bytes if pose_bytes else step_bytes
        return (self.left + largest - 2 * self._gradient_bytes) // step_bytes

    def _capped(self, fitting: int, remaining: int) -> int:
        self._last_chunk = self._size(fitting, remaining)
        return self._last_chunk

    def _size(self, fitting: int, remaining: int) -> int:
        if self._splits_chunks:
            size = 1
        elif self._chunk_size is not None:
            size = min(self._chunk_size, remaining)
        elif not self._batched or self.one_by_one or self.need.known is None:
            size = 1
        else:
            size = max(1, min(fitting, remaining))
        if self._chunk_size is None and self._learned.largest_chunk is not None:
            size = min(size, self._learned.largest_chunk)
        return size

    def split_chunks(self) -> None:
        """Run the poses of this batch one by one from now on, also where the user set another size."""
        self._splits_chunks = True

    def retry_smaller(self, attempt: Callable[[], Result], *, resizable: bool = True) -> Result:
        """Return the result of `attempt`; after running out of memory, ask for less and call it again (Rule 4).

        Args:
            attempt: A function that asks for sizes and leaves no trace if it raises.
            resizable: Whether `attempt` uses the sizes. If not, only later batches benefit.

        Raises:
            RuntimeError: The memory runs out with one pose, or with a fixed size and nothing that runs plainly.
        """
        while True:
            try:
                return attempt()
            except (StartAgainError, HooksRefusedError) as error:
                logger.debug("starting the batch again: {}", error)
            except (RuntimeError, MemoryError) as error:
                if not (ran_out_of_memory(error) and self._halve() and resizable):
                    raise
            # The frames of the failed attempt, and their tensors, are released here.
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _halve(self) -> bool:
        """Ask for half of the memory and of the last chunk; return False if both are at their least."""
        used = min(self.limit, self._planned)
        if self._last_chunk <= 1 and used == 0:
            return False
        if self._chunk_size is None:
            self._learned.largest_chunk = (self._last_chunk + 1) // 2
        elif used == 0:
            return False
        self._learned.memory_limit = (self._memory_option, used // 2 if used > self.need.step_bytes else 0)
        logger.debug(
            "out of memory: continuing within {} and with at most {} poses at once",
            format_bytes(self.limit),
            self._learned.largest_chunk or self._chunk_size,
        )
        return True

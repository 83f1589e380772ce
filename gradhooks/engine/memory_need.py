"""MemoryNeed: how many bytes poses need, measured on the first ones and on those that are larger.

Rules:
    1. A graph needs what it saves for its backward, and, while it is built or run through, `TEMPORARIES` times the
       largest saved tensor (measured: 0.5 to 3 times). Without a graph the need is the peak of the forward.
    2. What a pose of a chunk needs depends on the bytes of the chunk's input per pose: with padding, on the longest
       pose. Above the largest input that was measured the need grows at most quadratically (pairs of atoms or tokens);
       below it, it is at most on the line between the needs of the smallest and the largest input. An input that is
       larger than all that were measured, or less than half of them, is measured again.
    3. The largest need counts among inputs of one size, and where no size is given, so that a budget is a limit.
    4. Saved tensors are seen by hooks. `torch.func` refuses them; then the storages that operations return are counted.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import ceil

import torch
from torch import Tensor

from gradhooks.engine.learned import Learned, Mode, NeedRange, PoseNeed
from gradhooks.engine.live_bytes import LiveBytes
from gradhooks.engine.saved_tensors import record_saved_tensors

TEMPORARIES = 3
LAUNCH_BYTES = {"cpu": 2**15}
"""The bytes that a device handles while an operator is launched: some microseconds, at gigabytes per second."""
LAUNCH_BYTES_OF_DEVICES = 2**24
_HOOKS_REFUSED = "saved tensor hooks"

Sizes = Callable[[Tensor], tuple[int, int, int]]
"""Returns the bytes that the graph of some predictions keeps, those of temporary tensors, and how many are saved."""


class HooksRefusedError(Exception):
    """Internal: the model cannot run under hooks on saved tensors."""


class MemoryNeed:
    """The memory that poses need in one mode of the model.

    Args:
        learned: What earlier batches have shown.
        mode: The mode.
        device: The device of the model.
        with_graph: Whether graphs are kept; if not, the forward alone needs memory.
    """

    def __init__(self, learned: Learned, mode: Mode, device: torch.device, *, with_graph: bool) -> None:
        self._learned = learned
        self._mode = mode if with_graph else f"{mode} without graph"
        self._device = device
        self._with_graph = with_graph

    @property
    def known(self) -> NeedRange | None:
        """What was measured in this mode."""
        return self._learned.pose_needs.get(self._mode)

    @property
    def largest(self) -> PoseNeed:
        """What a pose with the largest input needs; a graph of one byte if nothing was measured."""
        known = self.known
        if known is None:
            return PoseNeed(1, 0, 0)
        largest = known.largest
        return largest if largest.graph_bytes > 0 else largest._replace(graph_bytes=1)

    @property
    def graph_bytes(self) -> int:
        """What the graph of a pose keeps, of the largest input; 1 if nothing was measured."""
        return self.largest.graph_bytes

    @property
    def temporary_bytes(self) -> int:
        """What a pose needs beside its graph while it runs, with the largest input."""
        return self.largest.temporary_bytes

    @property
    def step_bytes(self) -> int:
        """What the step of one pose needs, with the largest input."""
        return self.largest.step_bytes

    @property
    def chunk_overhead(self) -> float:
        """What a chunk costs beside its poses, in steps of a pose: its operators are launched once; 0 if unknown."""
        launches = self._learned.saved_tensors.get(self._mode, 0)
        return launches * LAUNCH_BYTES.get(self._device.type, LAUNCH_BYTES_OF_DEVICES) / self.graph_bytes

    def step_bytes_of(self, pose_bytes: int) -> int:
        """Return what the step of a pose needs, given the bytes of its input; 0 if they are unknown (Rules 2 and 3)."""
        return (
            max(1, self._need_of(self.known, pose_bytes).step_bytes) if self.known and pose_bytes else self.step_bytes
        )

    def expected_graph(self, input_bytes: int, count: int) -> int:
        """Return what the graph of `count` poses is expected to keep, from the size of their input (Rule 2)."""
        known = self.known
        return count * self._need_of(known, input_bytes // count).graph_bytes if known else 0

    @staticmethod
    def _need_of(known: NeedRange, pose_bytes: int) -> PoseNeed:
        small, large = known
        if pose_bytes == 0 or large.input_bytes in (0, pose_bytes):
            return large
        if pose_bytes > large.input_bytes:
            growth = (pose_bytes / large.input_bytes) ** 2
            return PoseNeed(int(large.graph_bytes * growth), int(large.temporary_bytes * growth), pose_bytes)
        if pose_bytes <= small.input_bytes:
            return small
        share = (pose_bytes - small.input_bytes) / (large.input_bytes - small.input_bytes)
        graph, temporary, _ = (ceil(a + share * (b - a)) for a, b in zip(small, large, strict=True))
        return PoseNeed(graph, temporary, pose_bytes)

    def is_unmeasured(self, input_bytes: int, count: int) -> bool:
        """Return whether an input is larger than all that were measured, or half as large, or of no visible size."""
        known = self.known
        return (
            known is None
            or input_bytes == 0
            or input_bytes > count * known.largest.input_bytes
            or 2 * input_bytes < count * known.smallest.input_bytes
        )

    def measure(
        self, run: Callable[[], Tensor], input_bytes: int, count: int, excluded: Container[int]
    ) -> tuple[Tensor, int]:
        """Run a chunk and learn what it needs.

        Args:
            run: Runs the chunk.
            input_bytes: The size of its input.
            count: The number of its poses.
            excluded: Addresses of storages that do not count.

        Returns:
            The predictions, and the bytes of their graph.

        Raises:
            HooksRefusedError: The model refuses hooks; a second attempt counts storages instead.
        """
        with self._counting(excluded) as sizes:
            try:
                predictions = run()
            except RuntimeError as error:
                if _HOOKS_REFUSED not in str(error) or self._learned.hooks_refused:
                    raise
                self._learned.hooks_refused = True
                raise HooksRefusedError(str(error)) from error
            graph, temporary, tensors = sizes(predictions)
        self._learned.saved_tensors[self._mode] = max(tensors, self._learned.saved_tensors.get(self._mode, 0))
        self._learn(PoseNeed(-(-graph // count), -(-temporary // count), -(-input_bytes // count)))
        return predictions, graph

    def _learn(self, measured: PoseNeed) -> None:
        small, large = self.known or (measured, measured)
        if measured.input_bytes >= large.input_bytes:
            small = _larger(small, measured) if small.input_bytes == measured.input_bytes else small
            large = _larger(large, measured)
        elif measured.input_bytes <= small.input_bytes:
            small = _larger(small, measured) if small.input_bytes == measured.input_bytes else measured
        else:
            expected = self._need_of(NeedRange(small, large), measured.input_bytes)
            small, large = (_raised(end, expected, measured) for end in (small, large))
        self._learned.pose_needs[self._mode] = NeedRange(small, large)

    def _counting(self, excluded: Container[int]) -> AbstractContextManager[Sizes]:
        if self._with_graph and not self._learned.hooks_refused:
            return _counting_saved_tensors(excluded)
        return _counting_storages(self._device)


def _larger(first: PoseNeed, second: PoseNeed) -> PoseNeed:
    return PoseNeed(*map(max, first, second))


def _raised(end: PoseNeed, expected: PoseNeed, measured: PoseNeed) -> PoseNeed:
    """Return the need at one end of the line, raised by what was measured above the line."""
    excess = [max(0, found - on_line) for found, on_line in zip(measured, expected, strict=True)]
    return PoseNeed(end.graph_bytes + excess[0], end.temporary_bytes + excess[1], end.input_bytes)


@contextmanager
def _counting_saved_tensors(excluded: Container[int]) -> Iterator[Sizes]:
    with record_saved_tensors(excluded) as saved:
        yield lambda predictions: (
            sum(saved.values()),
            TEMPORARIES * max([predictions.nbytes, *saved.values()]),
            len(saved),
        )


@contextmanager
def _counting_storages(device: torch.device) -> Iterator[Sizes]:
    # A dispatch mode would leave compiled code uncompiled for good; this way it runs uncompiled once.
    with torch.compiler.set_stance("force_eager"), LiveBytes(device.type) as counter:
        yield lambda predictions: (counter.live, max(predictions.nbytes, counter.peak - counter.live), 0)


def mode_of(training: bool, autocast_dtypes: Sequence[torch.dtype]) -> Mode:
    """Return the mode of a model, a key of what is learned."""
    return " ".join(["train" if training else "eval", *map(str, autocast_dtypes)])

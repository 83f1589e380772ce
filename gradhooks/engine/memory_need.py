"""MemoryNeed: how many bytes poses need, measured on the first ones and on those that are larger.

Rules:
    1. A graph needs what it saves for its backward, and, while it is built or run through, `TEMPORARIES` times the
       largest saved tensor (measured: 0.5 to 3 times). Without a graph the need is the peak of the forward.
    2. The largest need per pose counts, so that a budget is a limit. It grows with the input at most quadratically
       (pairs of atoms or tokens); an input that is larger than all that were measured is measured again.
    3. Saved tensors are seen by hooks. `torch.func` refuses them; then the storages that operations return are counted.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from gradhooks.engine.learned import Learned, Mode, PoseNeed
from gradhooks.engine.live_bytes import LiveBytes
from gradhooks.engine.saved_tensors import record_saved_tensors

TEMPORARIES = 3
_HOOKS_REFUSED = "saved tensor hooks"

Sizes = Callable[[Tensor], tuple[int, int]]
"""Returns the bytes that the graph of some predictions keeps, and those of temporary tensors."""


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
    def known(self) -> PoseNeed | None:
        """What was measured in this mode."""
        return self._learned.pose_needs.get(self._mode)

    @property
    def graph_bytes(self) -> int:
        """What the graph of a pose keeps; 1 if nothing was measured."""
        return max(1, self.known.graph_bytes) if self.known else 1

    @property
    def temporary_bytes(self) -> int:
        """What a pose needs beside its graph while it runs."""
        return self.known.temporary_bytes if self.known else 0

    @property
    def step_bytes(self) -> int:
        """What the step of one pose needs."""
        return self.graph_bytes + self.temporary_bytes

    def expected_graph(self, input_bytes: int, count: int) -> int:
        """Return what the graph of `count` poses is expected to keep, from the size of their input (Rule 2)."""
        known = self.known
        if known is None:
            return 0
        growth = max(1.0, input_bytes / count / known.input_bytes) if known.input_bytes else 1.0
        return int(count * self.graph_bytes * growth**2)

    def is_unmeasured(self, input_bytes: int, count: int) -> bool:
        """Return whether an input is larger than all that were measured; True if its size cannot be seen."""
        known = self.known
        return known is None or input_bytes == 0 or input_bytes > count * known.input_bytes

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
            graph, temporary = sizes(predictions)
        need = self._learned.pose_needs.setdefault(self._mode, PoseNeed())
        need.graph_bytes = max(need.graph_bytes, -(-graph // count))
        need.temporary_bytes = max(need.temporary_bytes, -(-temporary // count))
        need.input_bytes = max(need.input_bytes, -(-input_bytes // count))
        return predictions, graph

    def _counting(self, excluded: Container[int]) -> AbstractContextManager[Sizes]:
        if self._with_graph and not self._learned.hooks_refused:
            return _counting_saved_tensors(excluded)
        return _counting_storages(self._device)


@contextmanager
def _counting_saved_tensors(excluded: Container[int]) -> Iterator[Sizes]:
    with record_saved_tensors(excluded) as saved:
        yield lambda predictions: (sum(saved.values()), TEMPORARIES * max([predictions.nbytes, *saved.values()]))


@contextmanager
def _counting_storages(device: torch.device) -> Iterator[Sizes]:
    # A dispatch mode would leave compiled code uncompiled for good; this way it runs uncompiled once.
    with torch.compiler.set_stance("force_eager"), LiveBytes(device.type) as counter:
        yield lambda predictions: (counter.live, max(predictions.nbytes, counter.peak - counter.live))


def mode_of(training: bool, autocast_dtypes: Sequence[torch.dtype]) -> Mode:
    """Return the mode of a model, a key of what is learned."""
    return " ".join(["train" if training else "eval", *map(str, autocast_dtypes)])

"""Accumulation: what an accumulator does with one batch, from its first chunk to its total gradient."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.model_state import Snapshot


class Chunk(NamedTuple):
    """The poses `start .. stop - 1`, which ran together.

    Attributes:
        start: The index of the first pose.
        stop: The index after the last pose.
        before: The model state before they ran.
        pose_bytes: The bytes of their input for each pose, with padding; 0 if they are unknown.
    """

    start: int
    stop: int
    before: Snapshot
    pose_bytes: int = 0


@dataclass(frozen=True)
class Coefficients:
    """`dL/dy`, shape `(N, *prediction)`, float32 or wider.

    Attributes:
        through_combination: The part that came through the combination.
        direct: The part that came from the loss to the pose predictions directly, or None.
        largest: Shape `()`: the largest finite absolute coefficient of the whole batch, if this is a part of it.
    """

    through_combination: Tensor
    direct: Tensor | None
    largest: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum of both parts."""
        return self.through_combination if self.direct is None else self.through_combination + self.direct

    def of_rows(self, rows: slice) -> "Coefficients":
        """Return the coefficients of some poses."""
        size = self.total.detach().abs()
        largest = torch.where(size.isfinite(), size, 0).max()
        return Coefficients(self.through_combination[rows], None if self.direct is None else self.direct[rows], largest)


class Accumulation(ABC):
    """What an accumulator keeps of one batch until its coefficients are known.

    Attributes:
        keeps_graph: Whether the next chunk must run with a graph.
    """

    keeps_graph: bool

    @abstractmethod
    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        """Take a chunk; called once for each chunk, in order.

        Args:
            chunk: Which poses.
            predictions: Shape `(n, *prediction)`, with its graph if `keeps_graph` was true. The graph is freed after
                this call unless the accumulation keeps `predictions`.
        """

    def longest_chunk(self, start: int) -> int | None:
        """Return how many poses the chunk that begins at `start` should have at most; None for any number."""
        del start
        return None

    @abstractmethod
    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        """End the first run.

        Args:
            predictions: Shape `(N, *prediction)`, detached.

        Returns:
            The tensors that `gradients` needs. Autograd saves them: it frees them after the backward, checks that they
            were not changed in place, and `save_on_cpu` moves them.
        """

    @abstractmethod
    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        """Return `sum_i c_i dy_i/dtheta` for each leaf, None for a leaf that no pose reaches.

        Args:
            saved: What `close` returned.
            coefficients: The coefficients `c_i`.
            last: Whether `saved` may be overwritten, since no other backward follows.
        """


class NoPoses(Accumulation):
    """The accumulation of a rank without poses.

    Args:
        leaf_count: The number of leaves.
    """

    keeps_graph = False

    def __init__(self, leaf_count: int) -> None:
        self._leaf_count = leaf_count

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        raise NotImplementedError("a rank without poses has no chunks")

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        del predictions
        return []

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        del saved, coefficients, last
        return [None] * self._leaf_count

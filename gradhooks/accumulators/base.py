"""The contract of an accumulator: how `sum_i c_i dy_i/dtheta` is had without N graphs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradhooks.engine.context import Chunk, Group
from gradhooks.errors import CombinationError


@dataclass(frozen=True)
class Coefficients:
    """`dL/dy`, once the loss is known; both of shape `(N, *prediction)`, float32 or wider.

    Attributes:
        through_combination: What came through the combination.
        direct: What came from the loss straight to the pose predictions, or None.
        largest: Shape `()`: the largest finite absolute total of the whole group, where these are but a part of it.
    """

    through_combination: Tensor
    direct: Tensor | None
    largest: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.through_combination if self.direct is None else self.through_combination + self.direct

    def of(self, own: slice) -> "Coefficients":
        """Those of some poses."""
        size = self.total.detach().abs()
        largest = torch.where(size.isfinite(), size, 0).max()
        return Coefficients(self.through_combination[own], None if self.direct is None else self.direct[own], largest)


class Accumulation(ABC):
    """What an accumulator keeps of one group until its coefficients are known.

    Attributes:
        keeps_graph: Whether the next chunk must come with its graph.
    """

    keeps_graph: bool

    @abstractmethod
    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        """Take note of a chunk; called once for each, in order.

        Args:
            chunk: Which poses.
            predictions: Shape `(n, *prediction)`, with its graph wherever `keeps_graph` was true. A accumulation that wants
                the graph used must do so now.
        """

    def watching(self) -> AbstractContextManager[None]:
        """Entered around the forward of each chunk but the first."""
        return nullcontext()

    @abstractmethod
    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        """The group is complete.

        Args:
            predictions: Shape `(N, *prediction)`, detached.

        Returns:
            The tensors that `gradients` will need. Autograd keeps them: it frees them after the backward, checks that
            nobody changed them in place, and lets `save_on_cpu` move them.
        """

    @abstractmethod
    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> list[Tensor | None]:
        """One total gradient for each leaf of the group, None where no pose reaches it.

        Args:
            kept: What `close` returned.
            coefficients: The coefficients.
            last: Whether `kept` may be overwritten: nobody will ask again.
        """


class Accumulator(ABC):
    """A way to accumulate; holds options and, at most, what it has learned. Subclass it for a plugin.

    Attributes:
        name: What the report calls it.
        recomputes: Whether it may run poses again instead, as it must where parameters are spread over ranks.
    """

    name: ClassVar[str]
    recomputes: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def open(self, group: Group, predictions: Tensor) -> Accumulation:
        """Begin a group whose first chunk has just run.

        Args:
            group: The group.
            predictions: Live, shape `(n, *prediction)`: the first chunk, which `add` will get next.
        """


def refuse_gradient_combination(group: Group, accumulator: str) -> None:
    """Refuse a group whose combination needs the gradients themselves.

    Raises:
        CombinationError: It defines `combine_gradients`.
    """
    if group.combination.combine_gradients is not None:
        raise CombinationError(
            f"combination {group.combination.name} defines combine_gradients, which needs the gradient of every pose; "
            f"the accumulator {accumulator!r} keeps none of them, use accumulator='store' or 'auto'"
        )

"""RunningSums: weighted sums of the gradients that arrive in the leaves."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Protocol, cast

from torch import Tensor
from typing_extensions import Self

from gradhooks.engine.gradient_sums import Factor, Gradients, accumulate, add_dense, add_into, scale_, zero_
from gradhooks.engine.parameter_hooks import HookHandle, Receiver
from gradhooks.numerics import at_least_float32


class InterceptedLeaves(Protocol):
    """What `RunningSums` needs of an engine."""

    @property
    def leaves(self) -> Sequence[Tensor]: ...

    def intercept(self, receive: Receiver, indices: Iterable[int]) -> HookHandle: ...


_gradient_of = attrgetter("grad")
HOOKED_BYTES = 64 * 1024
"""A gradient of this size that enters several sums is folded by a hook, and freed before the next one arrives.

Adding it takes longer than the call of the hook. Smaller gradients wait for the end of the backward.
"""


class RunningSums:
    """`count` weighted sums of the gradients that arrive in the leaves; memory: `count` copies of the gradients.

    One sum at a time is in the leaves' `.grad`, where autograd adds to it in place: this costs nothing per pose, and
    0.3 microseconds per parameter when another sum takes its place, which is less than to add the gradients up after
    each backward. `fold_into` adds one backward to several sums, with a factor each.

    Args:
        engine: Gives the leaves and the hooks.
        count: The number of sums. A sum takes no memory before a backward adds to it.

    Attributes:
        has_sparse: Whether a sparse gradient had arrived when `unreached` was last called.
    """

    def __init__(self, engine: InterceptedLeaves, count: int) -> None:
        self._engine = engine
        self._leaves = engine.leaves
        self._count = count
        self._sums: dict[int, Gradients] = {}
        self._dense: dict[int, tuple[list[int], list[Tensor]]] = {}  # leaves and tensors of sums that `_fold` knows
        self.has_sparse = False
        self._in_leaves: int | None = None
        self._targets: list[tuple[int, Factor]] = []
        self._unhooked = list(range(len(self._leaves)))
        self._unhooked_leaves = list(self._leaves)
        self._unreached = set(self._unhooked)
        self._hooks = ExitStack()
        narrow = {dtype for dtype in {leaf.dtype for leaf in self._leaves} if at_least_float32(dtype) != dtype}
        self._hook([index for index, leaf in enumerate(self._leaves) if leaf.dtype in narrow] if narrow else ())
        self._hooks_large = False
        self.add_to(0)

    def _hook(self, indices: Sequence[int]) -> None:
        """Let hooks add what arrives in these leaves."""
        if indices:
            self._hooks.callback(self._engine.intercept(self._receive, indices).close)
            self._unhooked = sorted({*self._unhooked} - {*indices})
            self._unhooked_leaves = [self._leaves[index] for index in self._unhooked]

    def _receive(self, index: int, gradient: Tensor) -> None:
        for k, factor in self._targets:
            sums = self._sums[k]
            sums[index] = accumulate(sums[index], gradient, factor, copy=k != self._targets[-1][0])

    def add_to(self, k: int) -> None:
        """Let the next backwards add to sum `k`."""
        if k == self._in_leaves:
            return
        self._put_back()
        sums = self._sum(k)
        self._dense.pop(k, None)  # autograd may replace a gradient that it does not add in place
        for index, leaf in zip(self._unhooked, self._unhooked_leaves, strict=True):
            leaf.grad = sums[index]
        self._in_leaves, self._targets = k, [(k, 1.0)]

    @contextmanager
    def fold_into(self, first: int, factors: Sequence[Factor]) -> Iterator[None]:
        """Add the one backward of the block, times `factors[k]`, to sum `first + k`. `factors[0]` is the number 1."""
        self._put_back()
        if not self._hooks_large:
            self._hooks_large = True
            self._hook([index for index in self._unhooked if self._leaves[index].nbytes >= HOOKED_BYTES])
        # The last target may take over the gradient; it is the sum whose factor is 1.
        self._targets = [(first + k, factor) for k, factor in enumerate(factors) if _may_count(factor)][::-1]
        for k, _ in self._targets:
            self._sum(k)
        yield
        reached, arrived = self._unhooked, self._take_from_leaves()
        gradients = [gradient for gradient in arrived if gradient is not None]
        if len(gradients) < len(reached):
            reached = [index for index, gradient in zip(reached, arrived, strict=True) if gradient is not None]
        for k, factor in self._targets if reached else ():
            self._fold(k, reached, gradients, factor)

    def _fold(self, k: int, reached: list[int], gradients: list[Tensor], factor: Factor) -> None:
        """Add the gradients of the leaves `reached` to sum `k`, which may lack some of them."""
        known, totals = self._dense.get(k, ([], []))
        if known is reached or known == reached:  # the common path: no Python per parameter
            add_dense(totals, gradients, factor)
            return
        sums, copy = self._sums[k], k != self._targets[-1][0]
        for index, gradient in zip(reached, gradients, strict=True):
            sums[index] = accumulate(sums[index], gradient, factor, copy=copy)
        totals = [cast("Tensor", sums[index]) for index in reached]
        if not any(total.is_sparse for total in totals):
            self._dense[k] = reached, totals

    def _put_back(self) -> None:
        """Move the sum that is in the leaves to the others."""
        if self._in_leaves is None:
            return
        sums = self._sums[self._in_leaves]
        for index, gradient in zip(self._unhooked, self._take_from_leaves(), strict=True):
            sums[index] = gradient
        self._in_leaves = None

    def _take_from_leaves(self) -> Gradients:
        """Return the gradients of the leaves without hooks, and clear these."""
        gradients = list(map(_gradient_of, self._unhooked_leaves))
        for leaf in self._unhooked_leaves:
            leaf.grad = None
        return gradients

    def _sum(self, k: int) -> Gradients:
        return self._sums.setdefault(k, [None] * len(self._leaves))

    def rescale(self, first: int, factor: Factor, shifts: Sequence[Factor]) -> None:
        """Add `shifts[k]` times sum `first` to sum `first + k + 1`, then multiply all of these sums by `factor`.

        The number 0 as factor sets them to zero, also where they are not finite.
        """
        if first == self._in_leaves and not shifts and len(self._unhooked) == len(self._leaves):
            _rescale(list(map(_gradient_of, self._leaves)), factor)
            return
        self._put_back()
        sums = [self._sum(first + k) for k in range(1 + len(shifts))]
        for other, shift in zip(sums[1:], shifts, strict=True):
            if _may_count(shift) and _may_count(factor):
                add_into(other, sums[0], shift, copy=True)
        for each in sums:
            _rescale(each, factor)

    def unreached(self) -> set[int]:
        """Return the leaves at which no backward has arrived yet."""
        before = self._unreached
        self._unreached = {
            index
            for index in self._unreached
            if self._leaves[index].grad is None and all(sums[index] is None for sums in self._sums.values())
        }
        self.has_sparse = self.has_sparse or any(map(self._is_sparse, before - self._unreached))
        return self._unreached

    def _is_sparse(self, index: int) -> bool:
        arrived = [self._leaves[index].grad, *(sums[index] for sums in self._sums.values())]
        return any(gradient is not None and gradient.is_sparse for gradient in arrived)

    def take(self) -> list[Gradients]:
        """Return all sums, remove the hooks and clear the leaves."""
        with self:
            self._put_back()
            return [self._sum(k) for k in range(self._count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()
        for leaf in self._leaves:
            leaf.grad = None
        self._sums, self._dense = {}, {}


def _rescale(gradients: Gradients, factor: Factor) -> None:
    if _may_count(factor):
        scale_(gradients, factor)
    else:
        zero_(gradients)


def _may_count(factor: Factor) -> bool:
    """Return whether a factor is not 0, as far as the host knows."""
    return isinstance(factor, Tensor) or factor != 0

"""RunningSums: weighted sums of the gradients that arrive in the leaves."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from gradhooks.engine.flat_sums import FlatSums, can_be_flat, is_of_one_kind
from gradhooks.engine.gradient_sums import (
    Factor,
    Gradients,
    accumulate,
    add_into,
    may_count,
    shift_and_rescale,
)
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
        self._flat: FlatSums | None = None  # the sums of these leaves are in blocks:
        self._flat_indices: list[int] = []
        self._reached: list[int] = []  # may become flat
        self._may_flatten = True
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
            self._let_wait({*self._unhooked} - {*indices})

    def _receive(self, index: int, gradient: Tensor) -> None:
        for k, factor in self._targets:
            sums = self._sums[k]
            sums[index] = accumulate(sums[index], gradient, factor, copy=k != self._targets[-1][0])

    def add_to(self, k: int) -> None:
        """Let the next backwards add to sum `k`."""
        if k == self._in_leaves:
            return
        if self._targets:
            self._end_flat()
        self._put_back()
        sums = self._sum(k)
        for index, leaf in zip(self._unhooked, self._unhooked_leaves, strict=True):
            leaf.grad = sums[index]
        self._in_leaves, self._targets = k, [(k, 1.0)]

    @contextmanager
    def fold_into(self, first: int, factors: Sequence[Factor]) -> Iterator[None]:
        """Add the one backward of the block, times `factors[k]`, to sum `first + k`. `factors[0]` is the number 1."""
        if self._in_leaves is not None:
            self._put_back()
        if not self._hooks_large:
            self._hooks_large = True
            self._hook([index for index in self._unhooked if self._leaves[index].nbytes >= HOOKED_BYTES])
        # The last target may take over the gradient; it is the sum whose factor is 1.
        self._targets = [(first + k, factor) for k, factor in enumerate(factors) if may_count(factor)][::-1]
        for k, _ in self._targets:
            self._sum(k)
        if self._reached:
            self._flatten()
        for k, _ in self._targets if self._flat is not None else ():
            self._add_to_flat(k)
        yield
        if self._flat is not None:
            self._flat.fold(self._targets)
        if self._unhooked:
            self._fold()

    def _fold(self) -> None:
        """Add what arrived in the leaves that are not flat to the targets."""
        arrived = list(zip(self._unhooked, self._take_from_leaves(), strict=True))
        reached = [(index, gradient) for index, gradient in arrived if gradient is not None]
        for k, factor in self._targets:
            sums = self._sums[k]
            totals = [sums[index] for index, _ in reached]
            add_into(totals, [gradient for _, gradient in reached], factor, copy=k != self._targets[-1][0])
            for (index, _), total in zip(reached, totals, strict=True):
                sums[index] = total
        if self._may_flatten and self._flat is None:
            small = [(index, gradient) for index, gradient in reached if can_be_flat(self._leaves[index], gradient)]
            self._reached = [index for index, gradient in small if is_of_one_kind(gradient, small[0][1])]

    def _flatten(self) -> None:
        """Let what arrives in the leaves that an earlier backward reached be added in one block (`FlatSums`)."""
        flat, self._reached = self._reached, []
        self._flat, self._flat_indices = FlatSums([self._leaves[index] for index in flat]), flat
        self._let_wait({*self._unhooked} - {*flat})

    def _add_to_flat(self, k: int) -> None:
        """Let sum `k` be in a block, too. What it lacks is zero: another sum contains it."""
        if self._flat is None or k in self._flat:
            return
        sums, indices = self._sums[k], self._flat_indices
        begun = [sums[index] for index in indices]
        if any(gradient is not None for gradient in begun):
            known: list[Tensor] | None = [
                torch.zeros_like(self._leaves[index], requires_grad=False) if gradient is None else gradient
                for index, gradient in zip(indices, begun, strict=True)
            ]
        else:
            known = None
        for index, part in zip(indices, self._flat.add_sum(k, known), strict=True):
            sums[index] = part

    def _let_wait(self, indices: Iterable[int]) -> None:
        """Let gradients wait in these leaves for the end of the backward, or of many backwards."""
        self._unhooked = sorted(indices)
        self._unhooked_leaves = [self._leaves[index] for index in self._unhooked]

    def _end_flat(self) -> None:
        """Treat all leaves alike again; the sums contain the parts of the blocks."""
        if self._flat is not None:
            self._flat.release()
            self._let_wait([*self._unhooked, *self._flat_indices])
            self._flat = None
        self._reached = []
        self._may_flatten = False  # moving sums to and fro would cost more than it saves

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
            shift_and_rescale([list(map(_gradient_of, self._leaves))], factor, ())
            return
        self._put_back()
        numbers = range(first, first + 1 + len(shifts))
        sums = [self._sum(k) for k in numbers]
        if self._flat is None:
            shift_and_rescale(sums, factor, shifts)
            return
        for k in numbers:
            self._add_to_flat(k)
        shift_and_rescale([[self._flat.block(k)] for k in numbers], factor, shifts)
        others = sorted({*range(len(self._leaves))} - {*self._flat_indices})
        if others:
            parts: list[Gradients] = [[each[index] for index in others] for each in sums]
            shift_and_rescale(parts, factor, shifts)
            for each, part in zip(sums, parts, strict=True):
                for index, gradient in zip(others, part, strict=True):
                    each[index] = gradient

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
        self._sums, self._flat = {}, None

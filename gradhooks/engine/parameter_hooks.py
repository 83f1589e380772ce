"""Parameter hooks: intercept the gradients of each pose before they reach the user's parameters.

    "Parameter-level hooks intercept per-pose gradients into a registry-driven accumulator, and combination plugins
    discovered via entry points consume the stored predictions and gradients to populate `.grad` after an outer loss
    backward."

This file is the first clause. Where the others are:

- The hooks sit on shadow parameters, which replace the user's parameters while poses run: `shadow_parameters.py`.
- Accumulators and combinations are found by name: `../registry.py`; the accumulators: `../accumulators/`.
- The predictions go to the combination, and the total gradient into `.grad`: `../autograd_function.py`.

No Python hook runs where autograd's own accumulation does the work: the gradient of each pose is added to `.grad` of
the shadow parameter, and one sum with one coefficient per pose needs no more (`RunningSums` with `count=1`). A hook is
registered only where several sums are kept, where the gradient of each pose is kept (accumulator "store"), or where a
parameter is narrower than float32, in whose dtype a sum would lose digits.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Protocol

from torch import Tensor
from typing_extensions import Self

from gradhooks.engine.gradient_sums import Gradients, accumulate, add_into, scale_
from gradhooks.numerics import at_least_float32

Receiver = Callable[[int, Tensor], None]


class ParameterHooks:
    """Hooks on the leaves of one group.

    Args:
        leaves: The shadow parameters, and the detached pose inputs.

    Attributes:
        leaves: The leaves.
        intercepting: Whether hooks take what arrives in the leaves. It is True only while gradhooks runs a backward, so
            that a backward called by the model itself is not intercepted.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self._registered: list[ExitStack] = []
        self.intercepting = False

    def intercept(self, receive: Receiver, indices: Iterable[int]) -> ExitStack:
        """Pass each gradient that arrives in a leaf to `receive(index, gradient)` and clear the leaf's `.grad`.

        Returns:
            A handle; `close()` removes the hooks. They are also removed when an error leaves the group: leaf, hook and
            receiver form a reference cycle through C++ that the garbage collector cannot see.
        """
        hooks = ExitStack()
        self._registered.append(hooks)
        for index in indices:
            hook = self._hook(receive, index)
            hooks.callback(self.leaves[index].register_post_accumulate_grad_hook(hook).remove)
        return hooks

    def _hook(self, receive: Receiver, index: int) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            if self.intercepting and leaf.grad is not None:
                gradient, leaf.grad = leaf.grad, None
                receive(index, gradient)

        return hook

    def clear(self) -> None:
        """Remove all hooks and clear `.grad` of the leaves."""
        for hooks in self._registered:
            hooks.close()
        for leaf in self.leaves:
            leaf.grad = None


class HookHandle(Protocol):
    """What `intercept` returns."""

    def close(self) -> None:
        """Remove the hooks. Closing twice does no harm."""


class InterceptedLeaves(Protocol):
    """What `RunningSums` needs of an engine."""

    @property
    def leaves(self) -> Sequence[Tensor]: ...

    def intercept(self, receive: Receiver, indices: Iterable[int]) -> HookHandle: ...


class RunningSums:
    """`count` weighted sums of the gradients that arrive in the leaves; memory: `count` copies of the gradients.

    With one sum in float32 or wider no Python runs per parameter: the cotangent carries the coefficient and autograd
    adds to the leaf's `.grad`. Otherwise a hook on each leaf adds the gradient to the sums and frees it, so that the
    gradient of one parameter is alive at a time.

    Args:
        engine: Gives the leaves and the hooks.
        count: The number of sums.
    """

    def __init__(self, engine: InterceptedLeaves, count: int) -> None:
        self._leaves = engine.leaves
        self._sums: list[Gradients] = [[None] * len(self._leaves) for _ in range(count)]
        self.set_factors((1.0,) * count)
        hooked = {i for i, leaf in enumerate(self._leaves) if count > 1 or at_least_float32(leaf.dtype) != leaf.dtype}
        self._summed_by_autograd = [index for index in range(len(self._leaves)) if index not in hooked]
        self._hooks = engine.intercept(self._receive, sorted(hooked))

    def set_factors(self, factors: Sequence[float]) -> None:
        """Set the factor with which the gradients of the next backward enter each sum."""
        # The sum that takes over the first gradient must come last, since the others would change with it.
        targets = reversed(list(zip(self._sums, factors, strict=True)))
        self._targets = [(sums, factor) for sums, factor in targets if factor != 0]

    def _receive(self, index: int, gradient: Tensor) -> None:
        for sums, factor in self._targets:
            sums[index] = accumulate(sums[index], gradient, factor)

    def rescale(self, factor: float, shifts: Sequence[float]) -> None:
        """Add `shifts[k]` times sum 0 to sum `k + 1`, then multiply every sum by `factor`."""
        first = self.sum(0)
        for sums, shift in zip(self._sums[1:], shifts, strict=True):
            add_into(sums, [gradient if shift else None for gradient in first], shift)
        for k in range(len(self._sums)):
            scale_(self.sum(k), factor)

    def clear(self) -> None:
        """Set all sums to zero."""
        for leaf in self._leaves:
            leaf.grad = None
        for sums in self._sums:
            sums[:] = [None] * len(self._leaves)

    def sum(self, k: int) -> Gradients:
        """Return sum `k`, one entry per leaf."""
        if k == 0:
            for index in self._summed_by_autograd:
                self._sums[0][index] = self._leaves[index].grad
        return self._sums[k]

    def take(self) -> list[Gradients]:
        """Return all sums, remove the hooks and clear the leaves."""
        with self:
            return [list(self.sum(k)) for k in range(len(self._sums))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()
        self.clear()

"""Parameter hooks: intercept the gradients of each pose before they reach the user's parameters.

    "Parameter-level hooks intercept per-pose gradients into a registry-driven accumulator, and combination plugins
    discovered via entry points consume the stored predictions and gradients to populate `.grad` after an outer loss
    backward."

This file is the first clause. Where the others are:

- The hooks sit on shadow parameters, which replace the user's parameters while poses run: `shadow_parameters.py`.
- Accumulators and combinations are found by name: `../registry.py`; the accumulators: `../accumulators/`.
- The predictions go to the combination, and the total gradient into `.grad`: `../autograd_function.py`.

No Python hook runs where autograd's own accumulation does the work: the gradient of each pose is added to `.grad` of
the shadow parameter, and one sum with one coefficient per pose needs no more (`RunningSums`). A gradient that enters
several sums is folded into them after the backward, all parameters in one call per sum. A hook is registered only where
the gradient of each pose is kept (accumulator "store"), where a parameter is narrower than float32, in whose dtype a
sum would lose digits, and where a gradient that enters several sums is so large that it must be freed at once.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Protocol

from torch import Tensor

Receiver = Callable[[int, Tensor], None]


class ParameterHooks:
    """Hooks on the leaves of one batch.

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
            A handle; `close()` removes the hooks. They are also removed when an error leaves the batch: leaf, hook and
            receiver form a reference cycle through C++ that the garbage collector cannot see.
        """
        hooks = ExitStack()
        self._registered.append(hooks)
        hooks.callback(self._registered.remove, hooks)
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
        for hooks in list(self._registered):
            hooks.close()
        for leaf in self.leaves:
            leaf.grad = None


class HookHandle(Protocol):
    """What `intercept` returns."""

    def close(self) -> None:
        """Remove the hooks. Closing twice does no harm."""

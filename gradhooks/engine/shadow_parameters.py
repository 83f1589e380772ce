"""Shadow parameters: where parameter-level hooks sit without anybody noticing.

Rules:
    1. A shadow is a detached `nn.Parameter` alias of a trainable parameter: same storage, same version counter, its own
       `.grad`. (Not a plain tensor: `torch.compile` would recompile.)
    2. While poses run, shadows stand in the modules' `_parameters`; the real parameters, their `.grad`, their hooks and
       DDP's reducer see nothing until the bridge delivers one total gradient.
    3. Tied parameters share one shadow. What cached its parameters outside `_parameters` gets the shadows there too.
    4. Pose inputs that require grad are cut the same way: an alias stands in for them while the poses run.
    5. Shadows live for one group: `.to()` and `p.data =` would leave older aliases on the old storage.
    6. A group may run inside another one's model; its shadows then stand in for shadows. A group in another thread may
       not: its gradients would end in the wrong shadows.
"""

import threading
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn

from gradhooks.errors import ConcurrentUseError

Receiver = Callable[[int, Tensor], None]

_swapping = threading.Lock()
_entered_here = threading.local()


class ShadowParameters:
    """The leaves of one group, each a pair of what is real and what stands in for it.

    Entering the object swaps the shadows in, leaving it puts back what stood there, whatever happened in between.

    Args:
        model: The model, or None where nothing can stand in for its parameters.

    Attributes:
        real: Trainable parameters of the model, then pose inputs that require grad.
        leaves: Their stand-ins, in the same order.
        receives: Whether hooks take what arrives in the leaves. A backward that the model calls itself leaves it there.

    Raises:
        ConcurrentUseError: On creation and on entry, if another thread has its shadows in the model.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.real: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._token = object()  # on each shadow; not `self`, which would be a cycle
        self._index: dict[int, int] = {}  # id of a real tensor -> its place; `real` keeps the ids valid
        self._slots: list[tuple[MutableMapping[str, Tensor | None], str, int]] = []
        self._flat: list[tuple[Any, list[Tensor]]] = []
        self._known: set[int] = set()  # ids of the leaves
        self.receives = False
        self._hooks: list[ExitStack] = []
        self._displaced: list[tuple[list[Tensor | None], list[list[Tensor]]]] = []
        for module in () if model is None else model.modules():
            self._shadow(module)
        self._parameters = len(self.real)

    @property
    def inputs(self) -> list[Tensor]:
        """The pose inputs among `real`."""
        return self.real[self._parameters :]

    def _shadow(self, module: nn.Module) -> None:
        slots = cast("MutableMapping[str, Tensor | None]", module._parameters)
        for name, parameter in slots.items():
            if parameter is not None and parameter.requires_grad:
                owner = _owner(parameter)
                if owner is not None and owner not in _tokens_here():
                    raise ConcurrentUseError(_CONCURRENT)
                self._slots.append((slots, name, self._place(parameter, self._alias_parameter)))
        if isinstance(module, nn.RNNBase):
            # Rule 3: the fused kernels read this list, not `_parameters`.
            weights = cast("list[Tensor]", module._flat_weights)
            self._flat.append((module, [self.stand_in_for(weight) for weight in weights]))

    def cut(self, tensor: Tensor) -> Tensor:
        """Rule 4: the stand-in for a pose input; the tensor itself where nothing flows into it."""
        return self.leaves[self._place(tensor, _alias_input)] if tensor.requires_grad else tensor

    def stand_in_for(self, tensor: Tensor) -> Tensor:
        """The stand-in of a tensor that has one, or the tensor."""
        place = self._index.get(id(tensor))
        return tensor if place is None else self.leaves[place]

    def _place(self, tensor: Tensor, alias: Callable[[Tensor], Tensor]) -> int:
        place = self._index.setdefault(id(tensor), len(self.real))
        if place == len(self.real):
            self.real.append(tensor)
            self.leaves.append(alias(tensor))
            self._known.add(id(self.leaves[-1]))
        return place

    def _alias_parameter(self, parameter: Tensor) -> Tensor:
        shadow = nn.Parameter(parameter.detach())
        shadow.__dict__.update(parameter.__dict__)  # marks that model code reads, as `weight.is_expert`
        shadow.__dict__["_gradhooks_owner"] = self._token
        return shadow

    def owns(self, leaf: Tensor) -> bool:
        """Whether a leaf is one of the stand-ins."""
        return id(leaf) in self._known

    def gathered(self, *, everywhere: bool) -> list[tuple[int, int] | None]:
        """A fingerprint of the gradients in the leaves; else of the first and the last parameter's, which is cheap."""
        leaves = self.leaves if everywhere else self.leaves[: self._parameters : max(1, self._parameters - 1)]
        return [None if leaf.grad is None else (id(leaf.grad), leaf.grad._version) for leaf in leaves]

    def intercept(self, receive: Receiver, places: Iterable[int]) -> ExitStack:
        """Hand each gradient that arrives in the leaves at `places` to `receive(place, gradient)`, then forget it.

        Returns:
            The hooks; `close()` takes them off. So does an exception that leaves the shadows: leaf, hook and receiver
            are a cycle that the collector cannot see through.
        """
        hooks = ExitStack()
        self._hooks.append(hooks)
        for place in places:
            hook = self._handing_over(receive, place)
            hooks.callback(self.leaves[place].register_post_accumulate_grad_hook(hook).remove)
        return hooks

    def forget(self) -> None:
        """Take all hooks off, and drop what has arrived in the leaves."""
        for hooks in self._hooks:
            hooks.close()
        for leaf in self.leaves:
            leaf.grad = None

    def _handing_over(self, receive: Receiver, place: int) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            if self.receives and leaf.grad is not None:
                gradient, leaf.grad = leaf.grad, None
                receive(place, gradient)

        return hook

    def __enter__(self) -> None:
        with _swapping:
            parameters = [slots[name] for slots, name, _ in self._slots]
            for parameter, (_, _, place) in zip(parameters, self._slots, strict=True):
                if _owner(parameter) not in (None, self._token) and parameter is not self.real[place]:
                    raise ConcurrentUseError(_CONCURRENT)
            self._displaced.append((parameters, [module._flat_weights for module, _ in self._flat]))
            for slots, name, place in self._slots:
                slots[name] = self.leaves[place]
            for module, weights in self._flat:
                module._flat_weights = weights
        _tokens_here().append(self._token)

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.forget()
        _tokens_here().remove(self._token)
        parameters, flat = self._displaced.pop()
        for (slots, name, _), parameter in zip(self._slots, parameters, strict=True):
            slots[name] = parameter
        for (module, _), weights in zip(self._flat, flat, strict=True):
            module._flat_weights = weights


_CONCURRENT = (
    "another thread is running a group through this model; give each thread a copy of the model, or let one wait for "
    "the other"
)


def _tokens_here() -> list[object]:
    if not hasattr(_entered_here, "tokens"):
        _entered_here.tokens = []
    return cast("list[object]", _entered_here.tokens)


def _owner(parameter: Tensor | None) -> object | None:
    return None if parameter is None else parameter.__dict__.get("_gradhooks_owner")


def _alias_input(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()

"""Shadow parameters: where parameter-level hooks sit without anybody noticing.

Rules:
    1. A shadow is a detached `nn.Parameter` alias of a trainable parameter: same storage, same version counter, its own
       `.grad`. (Not a plain tensor: `torch.compile` would recompile.)
    2. While poses run, shadows stand in the modules' `_parameters`; the real parameters, their `.grad`, their hooks and
       DDP's reducer see nothing until the bridge delivers one total gradient.
    3. Tied parameters share one shadow. What cached its parameters outside `_parameters` gets the shadows there too.
    4. Pose inputs that require grad are cut the same way: an alias stands in for them while the poses run.
    5. Shadows live for one group: `.to()` and `p.data =` would leave older aliases on the old storage.
"""

from collections.abc import Callable, Iterable, MutableMapping
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn

Receiver = Callable[[int, Tensor], None]


class ShadowParameters:
    """The leaves of one group, each a pair of what is real and what stands in for it.

    Entering the object swaps the shadows in, leaving it puts back what stood there, whatever happened in between.

    Attributes:
        real: Trainable parameters of the model, then pose inputs that require grad.
        leaves: Their stand-ins, in the same order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.real: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._index: dict[int, int] = {}  # id of a real tensor -> its place; `real` keeps the ids valid
        self._slots: list[tuple[MutableMapping[str, Tensor | None], str, Tensor]] = []
        self._flat: list[tuple[nn.RNNBase, list[Tensor]]] = []
        self._displaced: list[tuple[list[Tensor | None], list[list[Tensor]]]] = []
        for module in model.modules():
            self._shadow(module)
        self.parameters = len(self.real)

    def _shadow(self, module: nn.Module) -> None:
        slots = cast(MutableMapping[str, Tensor | None], module._parameters)
        for name, parameter in slots.items():
            if parameter is not None and parameter.requires_grad:
                self._slots.append((slots, name, self._stand_in(parameter, _alias_parameter)))
        if isinstance(module, nn.RNNBase):
            # Rule 3: the fused kernels read this list, not `_parameters`.
            self._flat.append((module, [self.stand_in_for(weight) for weight in module._flat_weights]))

    def cut(self, tensor: Tensor) -> Tensor:
        """Rule 4: the stand-in for a pose input; the tensor itself where nothing flows into it."""
        return self._stand_in(tensor, _alias_input) if tensor.requires_grad else tensor

    def stand_in_for(self, tensor: Tensor) -> Tensor:
        """The stand-in of a tensor that has one, or the tensor."""
        place = self._index.get(id(tensor))
        return tensor if place is None else self.leaves[place]

    def real_of(self, leaf: Tensor) -> Tensor:
        """What a stand-in stands for; the tensor itself where it is none."""
        return next((real for real, stand_in in zip(self.real, self.leaves, strict=True) if stand_in is leaf), leaf)

    def _stand_in(self, tensor: Tensor, alias: Callable[[Tensor], Tensor]) -> Tensor:
        if id(tensor) not in self._index:
            self._index[id(tensor)] = len(self.real)
            self.real.append(tensor)
            self.leaves.append(alias(tensor))
        return self.stand_in_for(tensor)

    def intercept(self, receive: Receiver, places: Iterable[int]) -> ExitStack:
        """Hand each gradient that arrives in the leaves at `places` to `receive(place, gradient)`, then forget it.

        Returns:
            The hooks; `close()` takes them off.
        """
        hooks = ExitStack()
        for place in places:
            hook = _handing_over(receive, place)
            hooks.callback(self.leaves[place].register_post_accumulate_grad_hook(hook).remove)
        return hooks

    def take_gradients(self) -> list[Tensor | None]:
        """The gradients that have gathered in the leaves, which are left without any."""
        gradients = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return gradients

    def __enter__(self) -> None:
        parameters = [slots[name] for slots, name, _ in self._slots]
        self._displaced.append((parameters, [module._flat_weights for module, _ in self._flat]))
        for slots, name, shadow in self._slots:
            slots[name] = shadow
        for module, weights in self._flat:
            module._flat_weights = weights

    def __exit__(self, *exception: object) -> None:
        parameters, flat = self._displaced.pop()
        for (slots, name, _), parameter in zip(self._slots, parameters, strict=True):
            slots[name] = parameter
        for (module, _), weights in zip(self._flat, flat, strict=True):
            module._flat_weights = weights


def _alias_parameter(parameter: Tensor) -> Tensor:
    shadow = nn.Parameter(parameter.detach())
    shadow.__dict__.update(parameter.__dict__)  # marks that model code reads, as `weight.is_expert`
    return shadow


def _alias_input(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _handing_over(receive: Receiver, place: int) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            receive(place, gradient)

    return hook


def reached_leaves(root: Tensor) -> list[Tensor]:
    """The leaves of autograd's graph below `root`, each once. Takes about 1 us a node."""
    leaves: list[Tensor] = []
    pending = [root.grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return leaves

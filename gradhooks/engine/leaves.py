"""Leaves: where the backward of each pose of a batch ends: shadow parameters, and aliases of pose inputs."""

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from gradhooks.engine.graph_leaves import accumulation_nodes
from gradhooks.engine.parameter_hooks import ParameterHooks
from gradhooks.engine.shadow_parameters import ShadowParameters

_gradient_of = attrgetter("grad")


class Leaves:
    """The leaves of one batch.

    A tensor in a pose that requires grad is treated as a parameter is: the model gets a detached alias.

    Args:
        parameters: The shadows of the model's parameters.

    Attributes:
        real: The trainable parameters of the model, then the pose inputs that require grad.
        shadows: The tensors that replace them, in the same order.
        hooks: The hooks on `shadows`.
    """

    def __init__(self, parameters: ShadowParameters) -> None:
        self._parameters = parameters
        self.real = list(parameters.real)
        self.shadows = list(parameters.shadows)
        self.hooks = ParameterHooks(self.shadows)
        self._parameter_count = len(self.real)
        self._input_index: dict[int, int] = {}  # id of a real input -> index; `real` keeps the ids valid
        self._ids = set(map(id, self.shadows))

    @property
    def inputs(self) -> list[Tensor]:
        """The pose inputs among `real`."""
        return self.real[self._parameter_count :]

    def shadow_input(self, tensor: Tensor) -> Tensor:
        """Return the alias of a pose input, or `tensor` itself if it does not require grad."""
        if not tensor.requires_grad or id(tensor) in self._ids:
            return tensor
        index = self._input_index.setdefault(id(tensor), len(self.real))
        if index == len(self.real):
            self.real.append(tensor)
            self.shadows.append(tensor.detach().requires_grad_())
            self._ids.add(id(self.shadows[-1]))
        return self.shadows[index]

    def nodes(self) -> frozenset[Any]:
        """Return the graph nodes at which a backward reaches the shadows, and None."""
        inputs = self.shadows[self._parameter_count :]
        return self._parameters.nodes.union(accumulation_nodes(inputs), (None,)) if inputs else self._parameters.nodes

    def contain(self, tensor: Tensor) -> bool:
        """Return whether `tensor` is one of the shadows."""
        return id(tensor) in self._ids

    @property
    def have_gradients(self) -> bool:
        """Whether any shadow has a `.grad`."""
        return any(gradient is not None for gradient in map(_gradient_of, self.shadows))

    def gradient_fingerprint(self) -> tuple[object, ...]:
        """Return what changes when a backward reaches the first or the last parameter."""
        if not self._parameter_count:
            return ()
        first, last = self.shadows[0].grad, self.shadows[self._parameter_count - 1].grad
        # The tensors themselves may not be kept: autograd replaces a gradient that somebody else refers to.
        return (
            *(() if first is None else (id(first), first._version)),
            *(() if last is None else (id(last), last._version)),
        )

    def names(self, model: nn.Module) -> list[str]:
        """Return the name of each leaf: that of the parameter (the first one if it is tied), or `input 0`, ..."""
        return [*self._parameters.names(model), *(f"input {number}" for number in range(len(self.inputs)))]

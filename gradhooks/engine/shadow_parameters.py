"""ShadowParameters: aliases that replace the user's parameters while poses run.

Rules:
    1. A shadow is a detached `nn.Parameter` alias of a trainable parameter: it shares storage and version counter and
       has a `.grad` of its own. (For a plain tensor `torch.compile` would recompile.)
    2. While poses run, shadows are in the `_parameters` of the modules. The user's parameters, their `.grad`, their
       hooks and the reducer of DDP see nothing until the total gradient is delivered (`autograd_function.py`).
    3. Tied parameters share one shadow. `nn.RNNBase` also gets the shadows in its cached list `_flat_weights`.
    4. Pose inputs that require grad are treated alike: the model gets a detached alias.
    5. Shadows live for one group: after `.to()` or `p.data =` older aliases would refer to the old storage.
    6. A group may run inside the model of another group; its shadows then replace shadows. A group in another thread
       may not, since its gradients would reach the wrong shadows.
    7. What undoes the swap is recorded before the first write, and undoing restores the parameters first.
"""

import threading
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from gradhooks.engine.parameter_hooks import ParameterHooks
from gradhooks.errors import ConcurrentUseError

_swap_lock = threading.Lock()
_entered_by_thread = threading.local()


class _Slot(NamedTuple):
    """An entry of a module's `_parameters`, and the index of its leaf."""

    parameters: MutableMapping[str, Tensor | None]
    name: str
    leaf: int


class _Saved(NamedTuple):
    """What was in the slots and in `_flat_weights` before the swap."""

    parameters: list[Tensor | None]
    flat_weights: list[list[Tensor]]


class ShadowParameters:
    """The leaves of one group. Entering the object puts the shadows into the model, leaving it restores the parameters.

    Args:
        model: The model, or None if its parameters cannot be replaced (they are sharded).

    Attributes:
        real: The trainable parameters of the model, then the pose inputs that require grad.
        leaves: Their shadows, in the same order.
        hooks: The hooks on `leaves`.

    Raises:
        ConcurrentUseError: On construction and on entry, if the model holds the shadows of another thread.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.real: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.hooks = ParameterHooks(self.leaves)
        self._token = object()  # marks each shadow; `self` would be a reference cycle
        self._index: dict[int, int] = {}  # id of a real tensor -> index; `real` keeps the ids valid
        self._slots: list[_Slot] = []
        self._rnn_weights: list[tuple[Any, list[Tensor]]] = []
        self._leaf_ids: set[int] = set()
        self._saved: list[_Saved] = []
        for module in () if model is None else model.modules():
            self._add_module(module)
        self._parameter_count = len(self.real)

    @property
    def inputs(self) -> list[Tensor]:
        """The pose inputs among `real`."""
        return self.real[self._parameter_count :]

    def _add_module(self, module: nn.Module) -> None:
        parameters = cast("MutableMapping[str, Tensor | None]", module._parameters)
        for name, parameter in parameters.items():
            if parameter is not None and parameter.requires_grad:
                owner = _owner(parameter)
                if owner is not None and owner not in _tokens_of_thread():
                    raise ConcurrentUseError(_CONCURRENT_USE)
                self._slots.append(_Slot(parameters, name, self._index_of(parameter, self._shadow_parameter)))
        if isinstance(module, nn.RNNBase):  # Rule 3: its kernels read this list instead of `_parameters`
            weights = cast("list[Tensor]", module._flat_weights)
            self._rnn_weights.append((module, [self.shadow_of(weight) for weight in weights]))

    def shadow_input(self, tensor: Tensor) -> Tensor:
        """Return the alias of a pose input (Rule 4), or `tensor` itself if it does not require grad."""
        return self.leaves[self._index_of(tensor, _detached_input)] if tensor.requires_grad else tensor

    def shadow_of(self, tensor: Tensor) -> Tensor:
        """Return the shadow of `tensor`, or `tensor` if it has none."""
        index = self._index.get(id(tensor))
        return tensor if index is None else self.leaves[index]

    def _index_of(self, tensor: Tensor, make_shadow: Callable[[Tensor], Tensor]) -> int:
        index = self._index.setdefault(id(tensor), len(self.real))
        if index == len(self.real):
            self.real.append(tensor)
            self.leaves.append(make_shadow(tensor))
            self._leaf_ids.add(id(self.leaves[-1]))
        return index

    def _shadow_parameter(self, parameter: Tensor) -> Tensor:
        shadow = nn.Parameter(parameter.detach())
        shadow.__dict__.update(parameter.__dict__)  # attributes that model code reads, such as `weight.is_expert`
        shadow.__dict__["_gradhooks_owner"] = self._token
        return shadow

    def is_shadow(self, leaf: Tensor) -> bool:
        """Return whether `leaf` is one of the shadows."""
        return id(leaf) in self._leaf_ids

    def gradient_fingerprint(self, *, all_leaves: bool) -> list[tuple[int, int] | None]:
        """Return identity and version of the leaves' `.grad`, or only of the first and last parameter's."""
        leaves = self.leaves if all_leaves else self.leaves[: self._parameter_count : max(1, self._parameter_count - 1)]
        return [None if leaf.grad is None else (id(leaf.grad), leaf.grad._version) for leaf in leaves]

    def leaf_names(self, model: nn.Module) -> list[str]:
        """Return the name of each leaf: that of the parameter (the first one if it is tied), or `input 0`, ..."""
        index_of = {**self._index, **{id(leaf): index for index, leaf in enumerate(self.leaves)}}
        names: dict[int, str] = {}
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():  # real, or shadows while they are in the model
                index = index_of.get(id(parameter))
                if index is not None:
                    names.setdefault(index, f"{path}.{name}" if path else name)
        first_input = self._parameter_count
        return [names.get(index, f"input {index - first_input}") for index in range(len(self.real))]

    def __enter__(self) -> None:
        with _swap_lock:
            for parameters, name, index in self._slots:
                parameter = parameters[name]
                if _owner(parameter) not in (None, self._token) and parameter is not self.real[index]:
                    raise ConcurrentUseError(_CONCURRENT_USE)
            saved = _Saved(
                [parameters[name] for parameters, name, _ in self._slots],
                [module._flat_weights for module, _ in self._rnn_weights],
            )
            try:
                for parameters, name, index in self._slots:
                    parameters[name] = self.leaves[index]
                for module, weights in self._rnn_weights:
                    module._flat_weights = weights
                self._saved.append(saved)
                _tokens_of_thread().append(self._token)
            except BaseException:  # Rule 7; an interrupt also arrives here
                self._put_back(saved)
                raise

    def __exit__(self, *exception: object) -> None:
        self._put_back(self._saved[-1])
        self._saved.pop()
        _tokens_of_thread().remove(self._token)
        if exception[0] is not None:
            self.hooks.clear()

    def _put_back(self, saved: _Saved) -> None:
        for (parameters, name, _), parameter in zip(self._slots, saved.parameters, strict=True):
            parameters[name] = parameter
        for (module, _), weights in zip(self._rnn_weights, saved.flat_weights, strict=True):
            module._flat_weights = weights


_CONCURRENT_USE = (
    "another thread is running a group through this model; give each thread a copy of the model, or let one wait for "
    "the other"
)


def _tokens_of_thread() -> list[object]:
    if not hasattr(_entered_by_thread, "tokens"):
        _entered_by_thread.tokens = []
    return cast("list[object]", _entered_by_thread.tokens)


def _owner(parameter: Tensor | None) -> object | None:
    return None if parameter is None else parameter.__dict__.get("_gradhooks_owner")


def _detached_input(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()

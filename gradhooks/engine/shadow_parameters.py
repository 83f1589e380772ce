"""ShadowParameters: aliases that replace the user's parameters while poses run.

Rules:
    1. A shadow is a detached alias of a trainable parameter: it shares storage and version counter, has a `.grad` of
       its own, and the class of the parameter. (For a plain tensor `torch.compile` would recompile.) A lazy parameter
       without a shape has no shadow: no pose of the batch uses it (`lazy_parameters.py`).
    2. While poses run, shadows are in the `_parameters` of the modules. The user's parameters, their `.grad`, their
       hooks and the reducer of DDP see nothing until the total gradient is delivered (`autograd_function.py`).
    3. Tied parameters share one shadow. `nn.RNNBase` also gets the shadows in its cached list `_flat_weights`.
    4. Shadows are kept between batches while the model is unchanged (`model_parts.py`): after `.to()` or `p.data =`
       older aliases would refer to the old storage. Between batches their `.grad` is None.
    5. A batch may run inside the model of another batch; its shadows then replace shadows. A batch in another thread
       may not, since its gradients would reach the wrong shadows.
    6. What undoes the swap is recorded before the first write, in a list of the thread, and undoing may be repeated. So
       `recovery.py` can undo it wherever an interrupt arrives, also where no statement of this file is reached.
"""

import copyreg
import operator
import threading
from collections import deque
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradhooks.engine.graph_leaves import accumulation_nodes
from gradhooks.errors import ConcurrentUseError

Table = MutableMapping[str, Tensor | None]
"""The `_parameters` of a module."""

_swap_lock = threading.RLock()
_thread = threading.local()


class ShadowParameters:
    """Shadows of the trainable parameters. Entering the object puts them into the model, leaving it restores all.

    Args:
        model: The model, or None if its parameters cannot be replaced (they are sharded).

    Attributes:
        real: The trainable parameters of the model.
        shadows: Their shadows, in the same order.
        nodes: The graph nodes at which a backward reaches the shadows, and None, which stands for no node.

    Raises:
        ConcurrentUseError: On construction and on entry, if the model holds the shadows of another thread.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.real: list[Tensor] = []
        self.shadows: list[Tensor] = []
        self._token = object()  # marks each shadow; `self` would be a reference cycle
        self._index: dict[int, int] = {}  # id of a real tensor -> index; `real` keeps the ids valid
        self._tables: list[Table] = []  # a table, a name in it and the number of a shadow for each entry
        self._names: list[str] = []
        self._numbers: list[int] = []
        self._rnn_weights: list[tuple[Any, list[Tensor]]] = []
        for module in () if model is None else model.modules():
            self._add_module(module)
        self.nodes: frozenset[Any] = frozenset()
        self.find_nodes()  # now, since a forward may freeze them

    def _add_module(self, module: nn.Module) -> None:
        table = cast("Table", module._parameters)
        for name, parameter in table.items():
            if parameter is not None and parameter.requires_grad and not is_lazy(parameter):
                refuse_concurrent_use(parameter)
                self._tables.append(table)
                self._names.append(name)
                self._numbers.append(self._index_of(parameter))
        if isinstance(module, nn.RNNBase):  # Rule 3: its kernels read this list instead of `_parameters`
            weights = cast("list[Tensor]", module._flat_weights)
            self._rnn_weights.append((module, [self._shadow_of(weight) for weight in weights]))

    def _shadow_of(self, tensor: Tensor) -> Tensor:
        index = self._index.get(id(tensor))
        return tensor if index is None else self.shadows[index]

    def _index_of(self, parameter: Tensor) -> int:
        index = self._index.setdefault(id(parameter), len(self.real))
        if index == len(self.real):
            shadow = _alias(parameter)
            shadow.__dict__["_gradhooks_owner"] = self._token
            self.real.append(parameter)
            self.shadows.append(shadow)
        return index

    def find_nodes(self) -> None:
        """Hold the nodes, so that they are the same in every graph."""
        self.nodes = frozenset([None, *accumulation_nodes(self.shadows)])

    def release_nodes(self) -> None:
        """Hold the nodes no longer: from now on only graphs do."""
        self.nodes = frozenset()

    def names(self, model: nn.Module) -> list[str]:
        """Return the name of each parameter in the model, the first one if it is tied."""
        index_of = {**self._index, **{id(shadow): index for index, shadow in enumerate(self.shadows)}}
        names: dict[int, str] = {}
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():  # real, or shadows while they are in the model
                index = index_of.get(id(parameter))
                if index is not None:
                    names.setdefault(index, f"{path}.{name}" if path else name)
        return [names[index] for index in range(len(self.real))]

    def refuse_left_gradients(self) -> None:
        """Refuse a gradient of somebody else's graph, which belongs to a real parameter and would enter a sum (Rule 4).

        Raises:
            ConcurrentUseError: Since the last batch, a backward that is not of gradhooks has reached a shadow.
        """
        left = [shadow for shadow in self.shadows if shadow.grad is not None]
        for shadow in left:
            shadow.grad = None
        if left:
            raise ConcurrentUseError(
                "since the last batch, a backward has reached the aliases that stand for the parameters while poses "
                f"run, and its gradient of {len(left)} parameters is lost: another thread has called the bare model "
                "while this one ran poses, or the model keeps a tensor with a graph. Give each thread a copy of the "
                "model, and detach what the model keeps; then run the step again"
            )

    def __enter__(self) -> None:
        with _swap_lock:
            present = list(map(operator.getitem, self._tables, self._names))
            if any(map(operator.is_not, present, map(self.real.__getitem__, self._numbers))):
                for parameter, number in zip(present, self._numbers, strict=True):
                    if parameter is not self.real[number]:
                        refuse_concurrent_use(parameter)
            swap = _Swap(
                self._token,
                (self._tables, self._names, present),
                [(module, module._flat_weights) for module, _ in self._rnn_weights],
            )
            _swaps_of_thread().append(swap)
            _put(self._tables, self._names, list(map(self.shadows.__getitem__, self._numbers)))
            for module, weights in self._rnn_weights:
                module._flat_weights = weights

    def __exit__(self, *exception: object) -> None:
        _leave_last()


class _Swap(NamedTuple):
    """What was in the modules before shadows were put in, and the token of these shadows."""

    token: object
    parameters: tuple[Sequence[Table], Sequence[str], Sequence[Tensor | None]]
    flat_weights: list[tuple[Any, list[Tensor]]]


def entered_count() -> int:
    """Return how many shadows this thread has put into modules, and not yet taken out."""
    return len(_swaps_of_thread())


def leave_all_beyond(count: int) -> None:
    """Take out the shadows of this thread, the last ones first, until `count` are left (Rule 6)."""
    while entered_count() > count:
        _leave_last()
    while _swap_lock._is_owned():  # type: ignore[attr-defined]
        _swap_lock.release()


def _leave_last() -> None:
    swaps = _swaps_of_thread()
    _put(*swaps[-1].parameters)
    for module, weights in swaps[-1].flat_weights:
        module._flat_weights = weights
    swaps.pop()


def _put(tables: Sequence[Table], names: Sequence[str], parameters: Sequence[Tensor | None]) -> None:
    """Write parameters into the tables of modules, in one call of C for all of them."""
    deque(map(operator.setitem, tables, names, parameters), maxlen=0)


def _alias(parameter: Tensor) -> Tensor:
    """Return a detached alias with the class of a parameter, its attributes and its slots."""
    alias, kind = parameter.detach(), type(parameter)
    if type(alias) is Tensor and issubclass(kind, nn.Parameter):
        alias = Tensor._make_subclass(kind, alias, require_grad=True)
    else:  # a tensor of a class of its own, which `detach` keeps
        alias = nn.Parameter(alias)
    alias.__dict__.update(parameter.__dict__)  # attributes that model code reads, such as `weight.is_expert`
    for name in copyreg._slotnames(kind):  # type: ignore[attr-defined]
        if hasattr(parameter, name):
            setattr(alias, name, getattr(parameter, name))
    return alias


def refuse_concurrent_use(parameter: Tensor | None) -> None:
    """Refuse a parameter in the place of which another thread has put a shadow.

    Raises:
        ConcurrentUseError: Another thread runs a batch through the model.
    """
    owner = None if parameter is None else parameter.__dict__.get("_gradhooks_owner")
    if owner is not None and all(swap.token is not owner for swap in _swaps_of_thread()):
        raise ConcurrentUseError(
            "another thread is running poses through this model; give each thread a copy of the model, or let one wait "
            "for the other"
        )


def _swaps_of_thread() -> list[_Swap]:
    if not hasattr(_thread, "swaps"):
        _thread.swaps = []
    return cast("list[_Swap]", _thread.swaps)

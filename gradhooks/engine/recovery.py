"""Recovery: whatever is raised, at whatever line, a call leaves everything as it was.

Blocks of `with` put back what they changed. An interrupt may arrive between such a block and the statement that would
put things back, so a call also remembers at its beginning what it must leave behind, and checks at its end.
"""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils._python_dispatch import _pop_mode

from gradhooks.engine.autocast import AutocastState, initialized_device_types
from gradhooks.engine.shadow_parameters import entered_count, leave_all_beyond

Function = TypeVar("Function", bound=Callable[..., Any])


class Recoverable(Protocol):
    """What a call may change beside its surroundings."""

    def begin(self) -> None:
        """Forget the state before an earlier call."""

    def recover(self) -> None:
        """Put back the state of the model at the beginning of this call."""


class Surroundings:
    """The modes of this thread, and the parameters in the modules, at one time."""

    def __init__(self) -> None:
        self._entered = entered_count()
        self._grad_mode = torch.is_grad_enabled()
        self._inference_mode = torch.is_inference_mode_enabled()
        self._autocast = AutocastState(initialized_device_types())
        self._hooks = _saved_tensor_hooks()
        self._mode_count = torch._C._len_torch_dispatch_stack()
        self._filters = warnings.filters

    def restore(self) -> None:
        """Put everything back."""
        leave_all_beyond(self._entered)
        torch.set_grad_enabled(self._grad_mode)
        self._autocast.restore()
        while _saved_tensor_hooks() not in (self._hooks, None):
            torch._C._autograd._pop_saved_tensors_default_hooks()
        while torch._C._len_torch_dispatch_stack() > self._mode_count:
            _pop_mode()
        if warnings.filters is not self._filters:
            warnings.filters = self._filters
            getattr(warnings, "_filters_mutated", _nothing)()  # private: lets Python look at the filters again


def _saved_tensor_hooks() -> Any:
    # Private, and not in torch 2.6, where hooks are left behind by an interrupt between two statements of theirs.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(False)


def _nothing() -> None:
    pass


def leaves_no_trace(recoverable_of: Callable[..., Recoverable]) -> Callable[[Function], Function]:
    """Decorate a function whose errors must leave no trace.

    Args:
        recoverable_of: Returns, from the function's arguments, what the function may change.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def guarded(*arguments: Any, **options: Any) -> Any:
            surroundings, recoverable = Surroundings(), recoverable_of(*arguments)
            recoverable.begin()
            try:
                return function(*arguments, **options)
            except BaseException:
                surroundings.restore()
                recoverable.recover()
                raise

        return cast("Function", guarded)

    return decorate

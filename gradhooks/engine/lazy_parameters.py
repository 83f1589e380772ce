"""Lazy modules, whose parameters get their shapes in the first forward that uses them.

Shadows need the shapes, so poses run before the batch until nothing is lazy. Each lazy parameter is initialized by the
first pose that uses it, as in plain PyTorch, and with the same random numbers if no forward draws any. These forwards
leave no other trace. A module that no pose uses stays lazy; then all poses run.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from gradhooks.engine.generator_states import GeneratorStates
from gradhooks.engine.module_values import ModuleValues
from gradhooks.engine.module_watch import modules_in_use
from gradhooks.engine.nested import independent_copy
from gradhooks.engine.parameter_values import ParameterValues
from gradhooks.engine.parametrization_cache import uncached_parametrizations
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.training_flags import with_training_flags
from gradhooks.options import Call
from gradhooks.random_state import default_source, global_sources


def initialize_lazy_parameters(model: nn.Module, poses: Poses, call: Call, device: torch.device) -> None:
    """Run poses, one by one, until no parameter or buffer of the model is lazy.

    Args:
        model: The model.
        poses: The poses of a batch.
        call: The option `call`.
        device: The device of the model, whose generator initializes parameters.
    """
    draws = GeneratorStates(map(default_source, {device, torch.device("cpu")}))
    for index in range(len(poses)):
        lazy_before = _lazy_modules(model)
        if not lazy_before:
            return
        draws.begin()
        before = draws.states
        with _nothing_else_changed(model, lazy_before):
            call(model, independent_copy(poses.slice(index, index + 1)))
        if len(_lazy_modules(model)) == len(lazy_before):  # nothing was initialized
            draws.restore(before, every=True)


def _lazy_modules(model: nn.Module) -> list[nn.Module]:
    modules = modules_in_use(model).values()
    return [module for module in modules if _is_lazy_module(module)]


def _is_lazy_module(module: nn.Module) -> bool:
    held = chain(module._parameters.values(), module._buffers.values())
    return any(tensor is not None and is_lazy(tensor) for tensor in held)


@contextmanager
def _nothing_else_changed(model: nn.Module, lazy: list[nn.Module]) -> Iterator[None]:
    """Restore after the block what a forward changes, except for what is lazy and the generators of PyTorch."""
    modules = modules_in_use(model)
    others = {path: module for path, module in modules.items() if module not in lazy}
    # Normalization in training writes its statistics only, which nobody records.
    flags = [(module, False) for module in modules.values() if isinstance(module, _NormBase)]
    with uncached_parametrizations(), with_training_flags(flags), ExitStack() as stack:
        for module in lazy:
            stack.enter_context(_restored_after_initialization(module))
        stack.enter_context(_restored(list(others.values())))
        stack.enter_context(_restored_parameters(others))
        generators = GeneratorStates(global_sources())
        generators.begin()
        stack.callback(generators.restore, generators.states, every=True)
        yield


@contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    values = ModuleValues(modules)
    values.begin("everything")
    before = values.records
    try:
        yield
    finally:
        values.restore(before, "everything")


@contextmanager
def _restored_parameters(modules: dict[str, nn.Module]) -> Iterator[None]:
    values = ParameterValues(modules)
    values.begin(probe=True, copy_all=True)
    before = values.records
    try:
        yield
    finally:
        values.restore(before)


@contextmanager
def _restored_after_initialization(module: nn.Module) -> Iterator[None]:
    """Let a lazy module end the block as its initialization leaves it, which is a hook before its first forward."""
    with ExitStack() as stack:

        def record(module: nn.Module, inputs: object) -> None:
            del inputs
            if not _is_lazy_module(module):
                stack.enter_context(_restored([module]))
            handle.remove()

        handle = module.register_forward_pre_hook(record)
        stack.callback(handle.remove)
        yield

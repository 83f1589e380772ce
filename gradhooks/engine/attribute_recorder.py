"""Recorder: walks through what a module holds, and records each mutable object once."""

import dataclasses
import random
import sys
import weakref
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gradhooks.engine.containers import LEFT_AS_IS, ContainerRecord, GraphReference, base_of
from gradhooks.engine.module_attributes import (
    MACHINERY,
    GeneratorRecord,
    ModuleRecord,
    Thoroughness,
    is_write_only,
    same_records,
)
from gradhooks.engine.plain_objects import PlainObjects, is_plain_object
from gradhooks.engine.script_attributes import record_script_attributes
from gradhooks.engine.tensor_records import TensorRecord
from gradhooks.random_state import generator_source

_RNN_MACHINERY = MACHINERY | {"_flat_weights"}  # parameters, replaced by shadows
_ATOMS = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, FunctionType}
_ATOMS |= {MethodType, type, slice, range, frozenset}
_MODULES_OF_GENERATORS = {"torch", "numpy"}


def computed_attributes(module: nn.Module) -> set[str]:
    """Return the attributes that `weight_norm` and `spectral_norm` compute from parameters in each forward."""
    hooks = module._forward_pre_hooks.values()
    return {hook.name for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}


class Recorder:
    """Walks through values and records each mutable object once, so that cycles end.

    Args:
        known: The latest record of the same module.
        thoroughness: How to compare tensors.
        hidden: Whether tensors may change without a sign: their content is compared, or copied on a device.

    Attributes:
        found_hidden: Whether a tensor changed without a sign.
    """

    def __init__(self, known: ModuleRecord, thoroughness: Thoroughness, *, hidden: bool) -> None:
        self.found_hidden = False
        self._known = known
        self._thoroughness = thoroughness
        self._hidden = hidden
        self._known_tensors = {id(record.tensor): record for record in known.tensors}
        self._known_states = {id(record.generator): record.state for record in known.generators}
        self._seen: dict[int, object] = {}  # keeps the objects, so that no id is given twice
        self._containers: list[ContainerRecord] = []
        self._tensors: list[TensorRecord] = []
        self._generators: list[GeneratorRecord] = []
        self._has_graph = False
        self._looks_into_objects = False

    def record(self, module: nn.Module) -> ModuleRecord:
        """Return what a module holds now, or the known record if that is the same."""
        script = None
        self._looks_into_objects = isinstance(module, PlainObjects)
        if isinstance(module, torch.jit.ScriptModule):
            script = record_script_attributes(module, self._known.script, self.add_tensor)
            for buffer in module._buffers.values():
                self.add_tensor(cast("Tensor", buffer))
        else:
            skipped = _RNN_MACHINERY if isinstance(module, nn.RNNBase) else MACHINERY
            self.add_container(vars(module), skipped | computed_attributes(module))
            if not is_write_only(module):
                self.add_container(module._buffers)
                self.add_container(module._non_persistent_buffers_set)
        record = ModuleRecord(
            tuple(self._containers), tuple(self._tensors), tuple(self._generators), script, self._has_graph
        )
        return self._known if same_records(record, self._known) else record

    def add_container(self, target: Any, skipped: frozenset[str] = frozenset()) -> None:
        """Record a container and everything in it."""
        if id(target) in self._seen:
            return
        self._seen[id(target)] = target
        if not isinstance(target, dict):
            items = tuple(map(self._visit, target))
            self._containers.append(ContainerRecord(target, None, items))
            return
        keys = tuple(key for key in target if key not in skipped) if skipped else tuple(target)
        items = tuple(self._visit(target[key]) for key in keys)
        self._containers.append(ContainerRecord(target, keys, items, skipped))

    def add_tensor(self, tensor: Tensor) -> None:
        """Record a tensor; share the known copy if the values are the same."""
        if id(tensor) in self._seen:
            return
        self._seen[id(tensor)] = tensor
        known = self._known_tensors.get(id(tensor))
        if known is None:
            self._tensors.append(TensorRecord(tensor, with_values=True))
        elif known.looks_unchanged() and (known.shows_all or not self._changed_without_sign(known)):
            self._tensors.append(known)
        elif known.looks_in_place() and tensor.device.type == "cpu" and known.has_same_values():
            self._tensors.append(known.renewed())
        else:
            self._tensors.append(TensorRecord(tensor, with_values=True))

    def _changed_without_sign(self, known: TensorRecord) -> bool:
        on_cpu = known.tensor.device.type == "cpu"
        if self._thoroughness == "everything" or (on_cpu and (self._hidden or self._thoroughness == "cpu")):
            changed = not known.has_same_values()
            self.found_hidden |= changed
            return changed
        return self._hidden  # copied on a device, since a comparison would wait for it

    def _visit(self, value: Any) -> Any:
        """Record what is in a value; return the item that stands for it."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, Tensor):
            return self._visit_tensor(value)
        if kind is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
            items = tuple(map(self._visit, value))
            return LEFT_AS_IS if any(map(_is_placeholder, items)) else value
        if base_of(value) is not None:
            self.add_container(value)
        if dataclasses.is_dataclass(value) or kind is SimpleNamespace or self._is_looked_into(value):
            self._visit_fields(value)
        elif kind.__module__.partition(".")[0] in _MODULES_OF_GENERATORS or isinstance(value, random.Random):
            self._visit_generator(value)
        return value

    def _is_looked_into(self, value: Any) -> bool:
        return self._looks_into_objects and is_plain_object(value)

    def _visit_tensor(self, value: Tensor) -> Any:
        if isinstance(value, nn.Parameter) or is_lazy(value):
            return value
        if value.grad_fn is not None:
            self._has_graph = True
            return GraphReference(weakref.ref(value))
        self.add_tensor(value)
        return value

    def _visit_fields(self, value: Any) -> None:
        if not isinstance(value, type) and hasattr(value, "__dict__"):
            self.add_container(vars(value))

    def _visit_generator(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        source = generator_source(value)
        if source is not None:
            self._seen[id(value)] = value
            state = source.read_if_changed(self._known_states.get(id(value)))
            self._generators.append(GeneratorRecord(source, value, state))
        elif _is_writable_array(value):
            self._seen[id(value)] = value
            alias = self._array_as_tensor(value)
            if alias is not None:
                self.add_tensor(alias)
                self.found_hidden = True  # arrays have no version counter

    def _array_as_tensor(self, array: Any) -> Tensor | None:
        """Return a tensor that shares the memory of an array, the known one if possible; None without numbers."""
        address = array.__array_interface__["data"][0]
        for record in self._known.tensors:
            alias = record.tensor
            if getattr(alias, "_array", None) is array and alias.data_ptr() == address:
                return alias
        try:
            alias = torch.from_numpy(array)
        except (TypeError, ValueError):  # text, objects, another byte order
            return None
        alias._array = array  # type: ignore[attr-defined]
        return alias


def _is_writable_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and bool(value.flags.writeable)


def _is_placeholder(item: object) -> bool:
    return item is LEFT_AS_IS or type(item) is GraphReference

"""What one module holds besides parameters and submodules: buffers, plain attributes, the containers in them.

Recorded are numbers, strings, None, tensors, numpy arrays, generators, and containers of them (list, tuple, dict, set,
deque and their subclasses, dataclasses, `SimpleNamespace`), nested and shared in any way, with the training flag.
Modules, parameters, functions and other objects are kept by identity only: nobody looks into them. Tensors with a graph
are not kept at all, since a snapshot would keep the graph.
"""

import operator
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from gradhooks.engine.containers import ContainerRecord
from gradhooks.engine.script_attributes import ScriptRecord
from gradhooks.engine.tensor_records import TensorRecord
from gradhooks.random_state import RandomSource

MACHINERY = frozenset(vars(nn.Module())) - {"training"}
_WRITE_ONLY = {_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward}

# How tensors are compared: by what shows, also by content where this does not wait for a device, or wholly by content.
Thoroughness: TypeAlias = Literal["signs", "cpu", "everything"]


class GeneratorRecord(NamedTuple):
    """The state of a random generator at one time."""

    source: RandomSource
    generator: object
    state: Any

    def restore(self) -> None:
        """Set the generator to the state."""
        self.source.set(self.state)


class ModuleRecord(NamedTuple):
    """What a module holds at one time."""

    containers: tuple[ContainerRecord, ...]
    tensors: tuple[TensorRecord, ...]
    generators: tuple[GeneratorRecord, ...]
    script: ScriptRecord | None
    has_graph: bool

    @property
    def shows_changes(self) -> bool:
        """Whether watching containers and tensors suffices to see a change."""
        return not (self.generators or self.script or self.has_graph)

    def restore(self, present: "ModuleRecord", *, hidden: bool) -> None:
        """Put everything back.

        Args:
            present: What the module held when it was recorded last.
            hidden: Whether tensors may change without a sign.
        """
        for container in self.containers:
            container.restore()
        current = set() if hidden else {id(record) for record in present.tensors if record.looks_unchanged()}
        for tensor in self.tensors:
            if id(tensor) not in current:
                tensor.restore()
        for generator in self.generators:
            generator.restore()
        if self.script is not None:
            self.script.restore()


EMPTY = ModuleRecord((), (), (), None, has_graph=False)


def is_write_only(module: nn.Module) -> bool:
    """Return whether the forward writes running statistics without reading them: normalization in training."""
    return isinstance(module, _NormBase) and module.training and type(module).forward in _WRITE_ONLY


def same_records(one: ModuleRecord, other: ModuleRecord) -> bool:
    """Return whether two records of a module have the same contents and share all copies."""
    return (
        one.script is other.script
        and not one.has_graph
        and _are_same(one.tensors, other.tensors)
        and _same_states(one.generators, other.generators)
        and _same_containers(one.containers, other.containers)
    )


def _same_states(one: tuple[GeneratorRecord, ...], other: tuple[GeneratorRecord, ...]) -> bool:
    return len(one) == len(other) and all(a.state is b.state for a, b in zip(one, other, strict=True))


def _same_containers(one: tuple[ContainerRecord, ...], other: tuple[ContainerRecord, ...]) -> bool:
    return len(one) == len(other) and all(map(_same_contents, one, other))


def _are_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _same_contents(one: ContainerRecord, other: ContainerRecord) -> bool:
    try:
        return one.target is other.target and one.keys == other.keys and one.items == other.items
    except Exception:  # `==` of any object
        return False

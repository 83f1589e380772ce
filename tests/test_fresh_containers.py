"""What a model writes into its pose stays in a copy of the containers; tensors are shared."""

import timeit
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gradhooks.engine.nested import fresh_containers


@dataclass
class Atoms:
    positions: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    positions: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Slotted:
    positions: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


class Plain:
    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self.notes: dict[str, Any] = {}


class Pair(NamedTuple):
    positions: Tensor
    notes: dict[str, Any]


class Inside(nn.Module):
    """A module is no container."""


def write_attribute(pose: Any) -> None:
    pose.hidden = 1


def write_notes(pose: Any) -> None:
    pose.notes["hidden"] = 1


def write_key(pose: Any) -> None:
    pose["hidden"] = 1


X = torch.ones(3)
POSES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "dict": (lambda: {"x": X}, write_key),
    "dict in dict": (lambda: {"a": {"x": X}}, lambda pose: write_key(pose["a"])),
    "OrderedDict": (lambda: OrderedDict(x=X), write_key),
    "defaultdict": (lambda: defaultdict(list, x=X), lambda pose: pose["new"].append(1)),
    "list in defaultdict": (lambda: defaultdict(list, x=[X]), lambda pose: pose["x"].append(1)),
    "UserDict": (lambda: UserDict(x=X), write_key),
    "list": (lambda: [X, X], lambda pose: pose.append(1)),
    "list in list": (lambda: [[X], X], lambda pose: pose[0].append(1)),
    "deque": (lambda: deque([[X]], maxlen=3), lambda pose: pose[0].append(1)),
    "set": (lambda: {1}, lambda pose: pose.add(2)),
    "tuple": (lambda: (X, {"x": X}), lambda pose: write_key(pose[1])),
    "named tuple": (lambda: Pair(X, {}), write_notes),
    "dataclass": (lambda: Atoms(X), write_attribute),
    "dict in dataclass": (lambda: Atoms(X), write_notes),
    "dict in frozen dataclass": (lambda: Frozen(X), write_notes),
    "dict in dataclass with slots": (lambda: Slotted(X), write_notes),
    "object": (lambda: Plain(X), write_attribute),
    "dict in object": (lambda: Plain(X), write_notes),
    "object in object": (lambda: SimpleNamespace(inner=Plain(X)), lambda pose: write_attribute(pose.inner)),
}


def described(value: Any) -> Any:
    """Return the structure of a value, without identities."""
    if isinstance(value, (str, int, Tensor)):
        return repr(value)
    if isinstance(value, (dict, UserDict)):
        return {key: described(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, deque, set)):
        return [described(part) for part in value]
    if isinstance(value, Slotted):
        return described([value.positions, value.notes])
    return described(vars(value))


@pytest.mark.parametrize("name", POSES)
def test_what_is_written_stays_in_the_copy(name: str) -> None:
    make, write = POSES[name]
    pose = make()
    fresh = fresh_containers(pose)
    assert type(fresh) is type(pose)
    assert described(fresh) == described(pose)
    write(fresh)
    assert described(pose) == described(make())
    assert described(fresh) != described(pose)


def test_tensors_are_shared() -> None:
    fresh = fresh_containers({"a": [X, (X,)], "b": Atoms(X)})
    assert fresh["a"][0] is X
    assert fresh["a"][1][0] is X
    assert fresh["b"].positions is X


def test_what_holds_no_container_is_returned_as_it_is() -> None:
    module, generator, view = Inside(), torch.Generator(), MappingProxyType({"x": X})
    for pose in (X, (X, X), (X, 3, "a", None), 3, "text", module, generator, view, print, Plain, frozenset({1})):
        assert fresh_containers(pose) is pose


def test_an_object_that_is_there_twice_is_there_twice_in_the_copy() -> None:
    shared: dict[str, Any] = {"x": X}
    shared["itself"] = shared
    fresh = fresh_containers([shared, shared])
    assert fresh[0] is fresh[1]
    assert fresh[0] is not shared
    assert fresh[0]["itself"] is fresh[0]


@pytest.mark.parametrize("hetero", [False, True])
def test_data_of_pytorch_geometric(hetero: bool) -> None:
    data = pytest.importorskip("torch_geometric.data")
    pose = data.HeteroData() if hetero else data.Data(x=X, notes={})
    if hetero:
        pose["atom"].x, pose["atom"].notes = X, {}
    for source in (pose, data.Batch.from_data_list([pose, pose])):
        fresh = fresh_containers(source)
        store, original = (fresh["atom"], source["atom"]) if hetero else (fresh, source)
        store.hidden = X
        assert "hidden" not in original
        assert type(fresh) is type(source)
        assert store.x is original.x
    fresh_containers(pose)["atom" if hetero else "notes"]["hidden"] = 1
    assert "hidden" not in (pose["atom"] if hetero else pose.notes)


def test_a_tensor_costs_next_to_nothing() -> None:
    for pose, limit in ((X, 20e-6), ((X, X), 20e-6), ({"x": X, "y": X, "z": X}, 100e-6)):  # ten times what was measured
        assert min(timeit.repeat(lambda pose=pose: fresh_containers(pose), number=100, repeat=5)) / 100 < limit

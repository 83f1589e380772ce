"""What a user passes as groups: `Groups`, `collate_groups`, and the checks of group numbers."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader, Dataset

from gradhooks import Groups, MultiPose, collate_groups
from gradhooks.errors import PosesError
from gradhooks.group_index import GroupIndex
from gradhooks.group_validation import group_index, read_index


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


# -- numbers ---------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, 0, 1],
    "tuple": lambda: (1, 0, 1),
    "int64": lambda: torch.tensor([1, 0, 1]),
    "uint8": lambda: torch.tensor([1, 0, 1], dtype=torch.uint8),
    "int32": lambda: torch.tensor([1, 0, 1], dtype=torch.int32),
    "numpy": lambda: np.array([1, 0, 1], dtype=np.int32),
    "read-only numpy": lambda: np.broadcast_to(np.array([1, 0, 1]), (3,)),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_forms_of_the_index(kind: str) -> None:
    index = read_index(NUMBERS[kind](), 3)
    assert (index.dtype, index.device.type, index.tolist()) == (torch.int64, "cpu", [1, 0, 1])
    assert Groups([1.0, 2.0, 3.0], NUMBERS[kind]()).index.tolist() == [1, 0, 1]


def test_the_index_is_a_copy() -> None:
    original = torch.tensor([0, 1])
    index = read_index(original, 2)
    original.zero_()
    assert index.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 1], "must have one number for each pose, got 2 numbers for 3 poses"),
        ([0, 1, 0, 1], ".*got 4 numbers for 3 poses"),
        ([], ".*got 0 numbers for 3 poses"),
        ([0, -1, -2], "must not be negative: pose 1 is in group -1"),
        ([True, False, True], "must be integers, one for each pose, got torch.bool"),
        (torch.tensor([0.0, 1.0, 1.0]), "must be integers, one for each pose, got torch.float32"),
        (torch.zeros(3, 1, dtype=torch.int64), r"must have shape \(M,\), .* got shape \(3, 1\)"),
        (torch.tensor(3), r".*got shape \(\)"),
        ([[0, 1], [0]], r"must be integers of shape \(M,\)"),
        (["a", "b", "c"], r"must be integers of shape \(M,\), .* got \['a', 'b', 'c'\]"),
        (None, r"must be integers of shape \(M,\), .* got None"),
    ],
)
def test_bad_numbers(numbers: Any, message: str) -> None:
    with pytest.raises(PosesError, match=f"^groups {message}"):
        read_index(numbers, 3)


def check(numbers: list[int], count: int | None = None, *, empty_allowed: bool = False) -> GroupIndex:
    return group_index(read_index(numbers, len(numbers)), count, empty_allowed=empty_allowed, combination_name="mean")


def test_number_of_groups() -> None:
    assert check([1, 0, 2, 2]).count == 3
    assert check([1, 0, 1], 2).count == 2
    assert check([3, 1], 6, empty_allowed=True).count == 6
    assert check([], 2, empty_allowed=True).sizes == [0, 0]


@pytest.mark.parametrize(
    ("numbers", "count", "empty_allowed", "message"),
    [
        ([0, 3, 1], 3, True, "pose 1 is in group 3, but count=3 allows the groups 0 to 2"),
        ([0, 2], None, False, r"no pose is in group 1; .* accepts_empty_groups = True .* here it is mean"),
        ([0, 2], None, True, "no pose is in group 1; "),
        ([0, 1], 4, False, "no pose is in group 2, 3; "),
        ([10**12], None, False, "no pose is in group 0, 1, 2, 3, 4 and 999999999995 more; "),
        ([], None, True, "the batch is empty"),
        ([0], 0, False, "count must be the number of groups, an integer of at least 1, got 0"),
        ([0], True, False, "got True"),
        ([0], 1.0, False, "got 1.0"),
    ],
)
def test_bad_groups(numbers: list[int], count: Any, empty_allowed: bool, message: str) -> None:
    with pytest.raises(PosesError, match=f"^.*{message}"):
        check(numbers, count, empty_allowed=empty_allowed)


# -- the validated index ---------------------------------------------------------------------------------------------


def test_rows_of_groups() -> None:
    index = check([2, 0, 2, 4, 0], 5, empty_allowed=True)
    assert [rows.tolist() for rows in index.rows()] == [[1, 4], [], [0, 2], [], [3]]
    assert index.sizes == [2, 0, 2, 0, 1]
    parts = index.split(torch.arange(10.0).view(5, 2))
    assert [part.tolist() for part in parts] == [[[2, 3], [8, 9]], [], [[0, 1], [4, 5]], [], [[6, 7]]]


def test_split_of_sorted_groups_makes_views() -> None:
    rows = torch.randn(4)
    assert [part.data_ptr() for part in check([0, 0, 1, 1]).split(rows)] == [rows.data_ptr(), rows[2:].data_ptr()]


def test_selected_poses_keep_the_number_of_groups() -> None:
    index = check([1, 0, 1, 2])
    for rows in (slice(0, 2), torch.tensor([0, 1]), torch.tensor([True, True, False, False])):
        part = index.select(rows)
        assert (part.index.tolist(), part.count, part.sizes) == ([1, 0], 3, [1, 1, 0])


def test_the_index_is_copied_to_a_device_once() -> None:
    index = check([1, 0])
    assert index.to(torch.device("meta")) is index.to(torch.device("meta"))
    assert index.to(torch.device("meta")).device.type == "meta"


def test_an_index_made_in_inference_mode_serves_a_backward() -> None:
    leaf = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        index = check([1, 0, 1])
        index.to(torch.device("cpu")), index.rows()
    sum(part.sum() for part in index.split(leaf)).backward()
    leaf.index_select(0, index.to(torch.device("cpu"))).sum().backward()
    assert leaf.grad is not None


# -- Groups ----------------------------------------------------------------------------------------------------------


@dataclass
class Complex:
    ligand: Tensor
    name: str


class Graph:
    """An object that moves itself, as graphs of PyTorch Geometric and DGL do."""

    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes

    def to(self, device: torch.device, non_blocking: bool = False) -> "Graph":
        return Graph(self.nodes.to(device, non_blocking=non_blocking))


def make_groups() -> Groups:
    poses = [{"x": torch.ones(2)}, (torch.ones(1), "text"), Complex(torch.ones(3), "a"), Graph(torch.ones(2))]
    return Groups(poses, [1, 0, 1, 1], 2)


def tensors_of(groups: Groups) -> list[Tensor]:
    mapping, pair, complex_, graph = groups.poses
    return [mapping["x"], pair[0], complex_.ligand, graph.nodes]


def test_length_is_the_number_of_poses() -> None:
    assert len(make_groups()) == 4
    assert len(Groups(iter([1.0, 2.0]), [0, 0])) == 2


def test_bad_index_is_refused_where_it_is_made() -> None:
    with pytest.raises(PosesError, match=r"must be integers, one for each pose, got torch\.float32"):
        Groups([1.0], [0.5])


def test_moving_to_a_device() -> None:
    groups = make_groups()
    moved = groups.to("meta", non_blocking=True)
    assert [tensor.device.type for tensor in tensors_of(moved)] == ["meta"] * 4
    assert [tensor.device.type for tensor in tensors_of(groups)] == ["cpu"] * 4
    assert (moved.index.tolist(), moved.count, moved.poses[1][1]) == ([1, 0, 1, 1], 2, "text")
    with pytest.raises(TypeError):
        groups.to(torch.float16)  # type: ignore[arg-type]


def test_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = Groups({"x": torch.zeros(2)}, [0, 0]).pin_memory()
    assert pinned.poses["x"].tolist() == [1, 1]
    assert pinned.index.tolist() == [0, 0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, through_pickle])
def test_copies(duplicate: Callable[[Any], Any]) -> None:
    groups = duplicate(make_groups())
    assert (groups.index.tolist(), groups.count, len(groups)) == ([1, 0, 1, 1], 2, 4)
    assert [tensor.numel() for tensor in tensors_of(groups)] == [2, 1, 3, 2]


def test_pytree() -> None:
    groups = Groups([torch.ones(2), torch.ones(2)], [1, 0], 2)
    leaves, spec = tree_flatten(groups)
    assert len(leaves) == 3
    rebuilt = tree_unflatten(leaves, spec)
    assert (rebuilt.poses[0] is groups.poses[0], rebuilt.index is groups.index, rebuilt.count) == (True, True, 2)
    shapes = tree_map(lambda leaf: leaf.shape, groups)  # what is not a tensor passes too
    assert shapes.index == (2,)


def test_trainers_move_and_convert_groups() -> None:
    accelerate = pytest.importorskip("accelerate.utils")
    lightning = pytest.importorskip("lightning.fabric.utilities")
    plugins = pytest.importorskip("lightning.pytorch.plugins.precision")
    groups = Groups({"x": torch.ones(2)}, [0, 1], 2)
    for move in (accelerate.send_to_device, lightning.move_data_to_device):
        moved, target = move((groups, torch.ones(2)), torch.device("meta"))
        assert (type(moved), moved.poses["x"].device.type, target.device.type) == (Groups, "meta", "meta")
    converted = plugins.DoublePrecision().convert_input(groups)
    assert (converted.poses["x"].dtype, converted.index.dtype) == (torch.float64, torch.int64)
    assert groups.poses["x"].dtype == torch.float32


@pytest.mark.parametrize("count", [-1, 0, True, 2.0, "2"])
def test_a_number_of_groups_that_is_none_is_refused_by_a_scorer(count: Any) -> None:
    scorer = MultiPose(nn.Linear(2, 1))
    with pytest.raises(PosesError, match=r"count must be the number of groups, an integer of at least 1, got"):
        scorer(Groups(torch.ones(3, 2), [0, 1, 0], count))
    assert scorer(Groups(torch.ones(3, 2), [0, 1, 0], np.int64(2))).combined.shape == (2, 1)


def test_data_parallel_with_device_ids_moves_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def call(model: nn.Module, poses: Tensor) -> Tensor:
        seen.append(poses.device.type)
        return model(poses)

    scorer = MultiPose(nn.Linear(2, 1, device="meta"), call=call)
    groups = Groups(torch.ones(3, 2), [0, 1, 0])
    active = SimpleNamespace(device_ids=[0], device_type="meta")  # as during a forward of the wrapper
    with torch.no_grad():
        for parallel, expected in [(active, "meta"), (SimpleNamespace(device_ids=None), "cpu"), (None, "cpu")]:
            seen.clear()
            monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", parallel)
            if expected == "meta":
                assert scorer(groups).combined.shape == (2, 1)
            else:
                with pytest.raises(RuntimeError, match=r"device|meta"):
                    scorer(groups)
            assert set(seen) == {expected}
    assert groups.poses.device.type == "cpu"


# -- collate_groups --------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Callable[[int], Any], Callable[[Any], list[float]]]] = {
    "list": (lambda n: [torch.tensor([float(n)])] * n, lambda poses: [pose.item() for pose in poses]),
    "generator": (lambda n: (float(n) for _ in range(n)), list),
    "tensor": (lambda n: torch.full((n, 1), float(n)), lambda poses: poses[:, 0].tolist()),
    "mapping": (
        lambda n: {"x": torch.full((n, 3), float(n)), "z": torch.full((n,), n)},
        lambda poses: [*poses["x"][:, 2].tolist()] if poses["z"].tolist() == poses["x"][:, 0].tolist() else [],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [[2, 1, 3], [1], [0, 2, 0], [2, 0]], ids=str)
def test_collation(form: str, sizes: list[int]) -> None:
    make, read = FORMS[form]
    groups, targets = collate_groups([(make(size), {"y": float(size)}) for size in sizes])
    assert read(groups.poses) == [float(size) for size in sizes for _ in range(size)]
    assert groups.index.tolist() == [number for number, size in enumerate(sizes) for _ in range(size)]
    assert groups.count == len(sizes)
    assert targets["y"].tolist() == sizes
    alone = collate_groups([make(size) for size in sizes])
    assert isinstance(alone, Groups)
    assert read(alone.poses) == read(groups.poses)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(torch.ones(2), 1.0), torch.ones(2)], "item 0 is a pair of poses and target, item 1 is not"),
        ([[1.0], torch.ones(2)], "the poses of item 0 are a list, those of item 1 a tensor; use one form for all"),
        ([([1.0], 0), (2.0, 0)], "the poses of item 1 are one float; they must be a list of poses, "),
        ([("abc", 0)], "the poses of item 0 are one str"),
        ([torch.ones(2, 3), torch.ones(2, 4)], r"item 0 has poses of shape \(3,\), of item 1 of shape \(4,\); pad"),
        ([torch.tensor(1.0)], "the stack of item 0 must be a tensor with the poses along axis 0"),
        ([{"x": torch.ones(2)}, {"y": torch.ones(2)}], r"item 0 have the keys \['x'\], those of item 1 \['y'\]"),
        ([{"x": torch.ones(2), "y": torch.ones(3)}], "item 0: stacked poses must agree .* {'x': 2, 'y': 3}"),
        ([{"x": [1.0]}], "'x' of item 0 must be a tensor"),
        ([{}], "the poses of item 0 are an empty mapping"),
    ],
)
def test_items_that_cannot_be_collated(items: list[Any], message: str) -> None:
    with pytest.raises(PosesError, match=message):
        collate_groups(items)


class Conformers(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> tuple[list[Tensor], float]:
        return [torch.full((3,), float(number))] * (number + 1), float(number)


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_data_loader(workers: int) -> None:
    loader: Iterator[Any] = iter(DataLoader(Conformers(), batch_size=3, collate_fn=collate_groups, num_workers=workers))
    (first, targets), (second, _) = loader
    assert (first.index.tolist(), first.count, targets.tolist()) == ([0, 1, 1, 2, 2, 2], 3, [0, 1, 2])
    assert [pose[0].item() for pose in second.poses] == [3] * 4 + [4] * 5

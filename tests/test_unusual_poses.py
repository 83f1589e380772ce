"""Poses that cannot be copied, that were made in inference mode, or that look like something else."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_reference import ACCUMULATORS_AND_PLAIN, assert_same_gradients, case_label, gradients_of, options_of

import gradhooks
from gradhooks.testing import full_graph


class Reads(nn.Module):
    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.last, self.read = nn.Linear(4, 1, dtype=torch.float64), read

    def forward(self, pose: Any) -> Tensor:
        return self.last(self.read(pose))


class File(MutableMapping[str, Any]):
    """A group of HDF5: a mapping that gives new objects each time, and cannot be copied."""

    def __init__(self, row: Tensor) -> None:
        self._row = row

    def __getitem__(self, key: str) -> Any:
        return self._row.numpy() if key == "x" else File(self._row)

    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError("nobody writes into the file")

    def __delitem__(self, key: str) -> None:
        raise AssertionError("nobody writes into the file")

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("h5py objects cannot be pickled")


@dataclasses.dataclass
class Locked:
    x: Tensor
    lock: Any

    def __copy__(self) -> Any:
        raise TypeError("cannot be copied")


class Proxy:
    """Any missing attribute raises an error of its own."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class Table:
    """A table with columns as attributes, like those of pandas."""

    def __init__(self, row: Tensor) -> None:
        self._columns = {"x": row.tolist(), "stores": [1, 2], "to_dict": [3, 4]}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._columns[name]


def in_inference_mode(row: Tensor) -> Tensor:
    with torch.inference_mode():
        return row.clone()


KINDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "file": (File, lambda pose: torch.from_numpy(pose["x"])),
    "file in a mapping": (lambda row: {"file": File(row)}, lambda pose: torch.from_numpy(pose["file"]["x"])),
    "dataclass with a lock": (lambda row: Locked(row, threading.Lock()), lambda pose: pose.x),
    "proxy": (Proxy, lambda pose: pose.x),
    "table": (Table, lambda pose: torch.tensor(pose.x, dtype=torch.float64)),
    "array": (lambda row: row.numpy(), lambda pose: torch.from_numpy(np.array(pose))),
    "inference tensor": (in_inference_mode, torch.clone),
    "inference tensor in a mapping": (lambda row: {"x": in_inference_mode(row)}, lambda pose: pose["x"].clone()),
}


def call(model: nn.Module, pose: Any) -> Tensor:
    return model(pose)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_poses(kind: str) -> None:
    make, read = KINDS[kind]
    rows = torch.randn(4, 4, dtype=torch.float64)
    model = Reads(read)
    combiner = gradhooks.combinations.Min(scale=1.0)
    full_graph(model, [make(row) for row in rows], combiner, call=call).combined.sum().backward()
    expected = gradients_of(dict(model.named_parameters()))
    for accumulator in ACCUMULATORS_AND_PLAIN:
        with case_label(accumulator):
            model.zero_grad()
            scorer = gradhooks.MultiPose(model, combiner, call=call, **options_of(accumulator))
            scorer([make(row) for row in rows]).combined.sum().backward()
            assert_same_gradients(gradients_of(dict(model.named_parameters())), expected)


def test_stacks_of_inference_mode() -> None:
    with torch.inference_mode():
        poses = torch.randn(4, 4, dtype=torch.float64)
    model = Reads(torch.clone)
    full_graph(model, poses.clone(), gradhooks.combinations.Mean()).combined.sum().backward()
    expected = gradients_of(dict(model.named_parameters()))
    for accumulator in ACCUMULATORS_AND_PLAIN:
        model.zero_grad()
        gradhooks.MultiPose(model, **options_of(accumulator))(poses).combined.sum().backward()
        assert_same_gradients(gradients_of(dict(model.named_parameters())), expected)

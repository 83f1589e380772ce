"""DistributedDataParallel around a MultiPose is exact; inside one it is refused."""

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import gradhooks
from gradhooks.testing import full_graph

RANKS = 2
MODES: list[dict[str, Any]] = [
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.rarely = nn.Linear(4, 1)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.inner(pose)
        return prediction + self.rarely(pose) if pose[0] > 0 else prediction


def loss_of(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum() + prediction.poses.tanh().mean()


def groups_of(step: int) -> list[list[Tensor]]:
    """One for each rank, of different sizes."""
    generator = torch.Generator().manual_seed(step)
    return [
        [torch.randn(4, generator=generator, dtype=torch.float64).abs() for _ in range(3 + 2 * rank)]
        for rank in range(RANKS)
    ]


def train(rank: int, mode: dict[str, Any], accumulator: str) -> float:
    """The largest deviation of a weight from a single process with the full graph, after three steps."""
    torch.manual_seed(0)
    model = Model().double()
    reference = copy.deepcopy(model)
    scorer = DistributedDataParallel(gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator), **mode)
    ours, theirs = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(reference.parameters(), 0.1)
    for step in range(3):
        groups = groups_of(step)
        ours.zero_grad()
        theirs.zero_grad()
        loss_of(scorer(groups[rank])).backward()
        predictions = [full_graph(reference, poses, gradhooks.combinations.Boltzmann()) for poses in groups]
        (sum(map(loss_of, predictions), torch.zeros(())) / RANKS).backward()
        ours.step()
        theirs.step()
    weights = zip(model.parameters(), reference.parameters(), strict=True)
    return max((one - other).abs().max().item() for one, other in weights)


def run_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        found = {
            f"{mode} {accumulator}": train(rank, mode, accumulator)
            for mode in MODES
            for accumulator in ("store", "stream", "recompute")
        }
    finally:
        dist.destroy_process_group()
    torch.save(found, Path(folder) / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_every_mode_of_data_parallel_training(tmp_path: Path) -> None:
    multiprocessing.spawn(run_rank, (free_port(), str(tmp_path)), nprocs=RANKS)
    for rank in range(RANKS):
        found: dict[str, float] = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 12
        assert {name: error for name, error in found.items() if error > 1e-12} == {}


def test_a_wrapper_inside_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.DataParallel(nn.Linear(4, 1)))
    with pytest.raises(gradhooks.DistributedError, match=r"module '1' of the model is a DataParallel.*wrap the bare"):
        gradhooks.MultiPose(model)([torch.zeros(4)])

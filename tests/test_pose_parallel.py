"""The poses of one group on several ranks: every rank ends with what one process would have."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import COMBINATIONS
from ranks import on_ranks
from torch import Tensor, nn

import gradhooks
from gradhooks.testing import full_graph

ACCUMULATORS = ("auto", "stream", "recompute", "store")
# How many of the poses each rank has.
SPLITS = {2: [[3, 4], [0, 5], [1, 0]], 4: [[2, 0, 3, 1], [0, 0, 0, 2]]}


class Model(nn.Module):
    """One layer takes part where a pose begins with a large number; another never does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.rarely, self.never = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.inner(pose)
        return prediction + self.rarely(pose) if pose[0] > 1 else prediction


def poses_of(step: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64))


def share_of(poses: list[Tensor], split: list[int], rank: int) -> list[Tensor]:
    return poses[sum(split[:rank]) : sum(split[: rank + 1])]


def of_combined(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum()


def of_poses(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return (prediction.poses.tanh() * torch.arange(1.0, 1 + len(prediction.poses)).unsqueeze(1)).sum()


def of_both(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return of_combined(prediction) + of_poses(prediction)


def deviation(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest of a weight or a gradient, relative to 1; infinite where one has a gradient and the other none."""
    worst = 0.0
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if (one.grad is None) != (other.grad is None):
            return float("inf")
        pairs = [(one, other)] if one.grad is None or other.grad is None else [(one, other), (one.grad, other.grad)]
        worst = max([worst, *((a - b).abs().max().item() for a, b in pairs)])
    return worst


def trained(
    rank: int, split: list[int], accumulator: str, combination: str, loss: Callable[..., Tensor], **options: Any
) -> float:
    """The deviation from a single process with the full graph after three steps."""
    torch.manual_seed(0)
    model, made = Model().double(), COMBINATIONS[combination]()
    if isinstance(made, nn.Module):
        made.double()
    reference, same = copy.deepcopy((model, made))
    scorer = gradhooks.MultiPose(model, made, accumulator=accumulator, process_group=dist.group.WORLD, **options)
    parameters = same.parameters() if isinstance(same, nn.Module) else ()
    ours = torch.optim.SGD(scorer.parameters(), 0.05)
    theirs = torch.optim.SGD([*reference.parameters(), *parameters], 0.05)
    worst = 0.0
    for step in range(3):
        poses = poses_of(step, sum(split))
        ours.zero_grad()
        theirs.zero_grad()
        prediction = scorer(share_of(poses, split, rank))
        assert len(prediction.poses) == sum(split)
        loss(prediction).backward()
        loss(full_graph(reference, poses, same)).backward()
        worst = max(worst, deviation(model, reference))
        if isinstance(made, nn.Module):
            worst = max(worst, deviation(made, same))
        ours.step()
        theirs.step()
    return worst


def every_way(rank: int, splits: list[list[int]]) -> dict[str, float]:
    losses = (of_combined, of_poses, of_both)
    return {
        f"{split} {accumulator} {combination} {loss.__name__}": trained(rank, split, accumulator, combination, loss)
        for split in splits
        for accumulator in ACCUMULATORS
        for combination in ("mean", "min", "boltzmann learnable", "attention")
        for loss in losses
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_ends_with_what_one_process_would_have(world_size: int) -> None:
    for found in on_ranks(every_way, SPLITS[world_size], world_size=world_size, timeout=120):
        assert len(found) == len(SPLITS[world_size]) * 48
        assert {name: error for name, error in found.items() if not error <= 1e-12} == {}

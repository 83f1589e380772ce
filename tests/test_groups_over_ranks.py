"""Batches of groups over several processes: groups that span ranks, groups of one rank, DDP and shards."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import RankError, run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradhooks
from gradhooks.testing import full_graph

COMBINATIONS = ("mean", "min", "boltzmann")
# The group of each pose, by rank.
SPANNING = [[0, 2, 1, 2], [1, 0, 3]]
OWN = [[1, 0, 1], [3, 2, 3, 3]]
ONE_RANK_WITHOUT_POSES = [[], [1, 0, 1, 2]]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def make_poses(index: list[list[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(groups), 4, generator=generator, dtype=torch.float64) for groups in index]


def loss_of(prediction: Any) -> Tensor:
    loss: Tensor = (prediction.combined - 0.3).square().sum() + 0.5 * prediction.per_pose.tanh().square().sum()
    return loss


def expected_gradients(index: list[list[int]], combination: str) -> list[Tensor]:
    model = make_model()
    make_combination = gradhooks.registry.combinations.resolve(combination)
    groups = torch.tensor([number for groups in index for number in groups])
    loss_of(full_graph(model, list(torch.cat(make_poses(index))), make_combination, groups=groups)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def largest_error(model: nn.Module, expected: list[Tensor]) -> float:
    pairs = zip(model.parameters(), expected, strict=True)
    return max(((leaf.grad - other).norm() / other.norm()).item() for leaf, other in pairs if leaf.grad is not None)


def pose_parallel_errors(rank: int, index: list[list[int]]) -> list[float]:
    errors = []
    for combination in COMBINATIONS:
        expected = expected_gradients(index, combination)
        for accumulator in ("auto", "recompute", "stream", "store"):
            model = make_model()
            scorer = gradhooks.MultiPose(model, combination, accumulator=accumulator, process_group=dist.group.WORLD)
            for step in range(2):
                model.zero_grad()
                prediction = scorer(make_poses(index)[rank], groups=index[rank])
                assert prediction.combined.shape == (max(map(max, filter(None, index))) + 1, 1), step
                loss_of(prediction).backward()
            errors.append(largest_error(model, expected))
    return errors


@pytest.mark.parametrize("index", [SPANNING, OWN, ONE_RANK_WITHOUT_POSES], ids=["spanning", "own", "empty rank"])
def test_groups_with_a_process_group(index: list[list[int]]) -> None:
    for errors in run_on_ranks(pose_parallel_errors, index, world_size=2):
        assert max(errors) < 1e-12


def groups_on_one_rank_only(rank: int, _: None) -> None:
    scorer = gradhooks.MultiPose(make_model(), process_group=dist.group.WORLD)
    scorer(torch.randn(3, 4, dtype=torch.float64), groups=[0, 1, 0] if rank == 0 else None)


def test_groups_on_one_rank_only_are_refused() -> None:
    with pytest.raises(RankError, match="groups= is missing on rank 1"):
        run_on_ranks(groups_on_one_rank_only, None, world_size=2)


def data_parallel_error(rank: int, memory: str | int) -> float:
    model = make_model()
    wrapped = DistributedDataParallel(gradhooks.MultiPose(model, "boltzmann", memory=memory))
    index = OWN[rank]
    numbers = torch.tensor(index) - min(index)
    for _ in range(2):
        wrapped.zero_grad()
        loss_of(wrapped(gradhooks.Groups(make_poses(OWN)[rank], numbers))).backward()
    expected = expected_gradients(OWN, "boltzmann")  # the losses add up over groups
    return largest_error(model, [gradient / 2 for gradient in expected])


@pytest.mark.parametrize("memory", [0, "1GiB"])
def test_groups_in_distributed_data_parallel(memory: str | int) -> None:
    assert max(run_on_ranks(data_parallel_error, memory, world_size=2)) < 1e-12


def sharded_error(rank: int, combination: str) -> float:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not imported by processes without shards

    model = make_model()
    fully_shard(model)
    scorer = gradhooks.MultiPose(model, combination)
    numbers = torch.tensor(OWN[rank]) - min(OWN[rank])
    for _ in range(2):
        model.zero_grad()
        loss_of(scorer(make_poses(OWN)[rank], groups=numbers)).backward()
    gathered = make_model()
    for parameter, shard in zip(gathered.parameters(), model.parameters(), strict=True):
        parameter.grad = shard.grad.full_tensor()
    return largest_error(gathered, [gradient / 2 for gradient in expected_gradients(OWN, combination)])


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 runs on a CPU from torch 2.7 on")
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_groups_with_sharded_parameters(combination: str) -> None:
    assert max(run_on_ranks(sharded_error, combination, world_size=2)) < 1e-12

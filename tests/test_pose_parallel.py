"""The poses of one group on several ranks: every rank ends with what one process would have."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from training_reference import COMBINATIONS

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


class Batched(nn.Module):
    """Takes several poses at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, poses: Tensor) -> Tensor:
        prediction: Tensor = self.inner(poses)
        return prediction


class Vectors(nn.Module):
    """Predicts three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 3)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.readout(pose).tanh()
        return prediction


def poses_of(step: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64))


def share_of(poses: list[Tensor], split: list[int], rank: int) -> list[Tensor]:
    return poses[sum(split[:rank]) : sum(split[: rank + 1])]


def of_combined(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum()


def of_poses(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return (prediction.per_pose.tanh() * torch.arange(1.0, 1 + len(prediction.per_pose)).unsqueeze(1)).sum()


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
    rank: int,
    split: list[int],
    accumulator: str,
    combination: str,
    loss: Callable[..., Tensor],
    *,
    model: Callable[[], nn.Module] = Model,
    **options: Any,
) -> float:
    """The deviation from a single process with the full graph after three steps."""
    torch.manual_seed(0)
    trainee, made = model().double(), COMBINATIONS[combination]()
    if isinstance(made, nn.Module):
        made.double()
    reference, same = copy.deepcopy((trainee, made))
    scorer = gradhooks.MultiPose(trainee, made, accumulator=accumulator, process_group=dist.group.WORLD, **options)
    parameters = same.parameters() if isinstance(same, nn.Module) else ()
    ours = torch.optim.SGD(scorer.parameters(), 0.05)
    theirs = torch.optim.SGD([*reference.parameters(), *parameters], 0.05)
    worst = 0.0
    for step in range(3):
        poses = poses_of(step, sum(split))
        ours.zero_grad()
        theirs.zero_grad()
        prediction = scorer(share_of(poses, split, rank))
        assert len(prediction.per_pose) == sum(split)
        loss(prediction).backward()
        loss(full_graph(reference, poses, same)).backward()
        worst = max(worst, deviation(trainee, reference))
        if isinstance(made, nn.Module):
            worst = max(worst, deviation(made, same))
        ours.step()
        theirs.step()
    return worst


def every_way(rank: int, splits: list[list[int]], combinations: list[str]) -> dict[str, float]:
    losses = (of_combined, of_poses, of_both)
    return {
        f"{split} {accumulator} {combination} {loss.__name__}": trained(rank, split, accumulator, combination, loss)
        for split in splits
        for accumulator in ACCUMULATORS
        for combination in combinations
        for loss in losses
    }


@pytest.mark.parametrize(
    ("world_size", "combinations"), [(2, ["mean", "min", "boltzmann learnable", "attention"]), (4, ["boltzmann"])]
)
def test_every_rank_ends_with_what_one_process_would_have(world_size: int, combinations: list[str]) -> None:
    splits = SPLITS[world_size]
    for found in on_ranks(every_way, splits, combinations, world_size=world_size, timeout=120):
        assert len(found) == len(splits) * len(combinations) * 12
        assert {name: error for name, error in found.items() if not error <= 1e-12} == {}


def inside_data_parallel(_: int, accumulator: str) -> float:
    """Two groups, each shared by two of four ranks, and DDP around all: the deviation from one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("groups", "poses"))
    torch.manual_seed(0)
    model = Model().double()
    reference = copy.deepcopy(model)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, process_group=mesh["poses"])
    wrapped = DistributedDataParallel(scorer, find_unused_parameters=True)
    ours, theirs = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(reference.parameters(), 0.1)
    worst = 0.0
    for step in range(3):
        groups = [poses_of(10 * step + place, 4 + place) for place in range(2)]
        ours.zero_grad()
        theirs.zero_grad()
        place, member = mesh.get_coordinate()
        of_both(wrapped(share_of(groups[place], [3, 1 + place], member))).backward()
        for poses in groups:
            (of_both(full_graph(reference, poses, COMBINATIONS["boltzmann"]())) / 2).backward()
        reached = [one for one in model.parameters() if one.grad is not None]
        assert len(reached) >= 4
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            difference = (0 if one.grad is None else one.grad) - (torch.zeros(()) if other.grad is None else other.grad)
            worst = max(worst, difference.abs().max().item())
        ours.step()
        theirs.step()
    return worst


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_together_with_data_parallel_training_on_a_mesh(accumulator: str) -> None:
    assert max(on_ranks(inside_data_parallel, accumulator, world_size=4)) <= 1e-12


def with_options(rank: int) -> dict[str, float]:
    split, batch = [3, 4], {"collate": torch.stack}
    chunks: dict[str, Any] = {"chunk_size": 2, **batch}
    return {
        "chunks": trained(rank, split, "auto", "boltzmann", of_both, model=Batched, **chunks),
        "chunks stored": trained(rank, split, "store", "mean", of_both, model=Batched, **chunks),
        "larger forward": trained(
            rank, split, "recompute", "max", of_both, model=Batched, forward_chunk_size=4, **batch
        ),
        "strict": trained(rank, split, "stream", "min", of_combined, tolerance=0.0),
        "vectors": trained(rank, split, "auto", "mean", of_combined, model=Vectors),
    }


def test_with_other_options() -> None:
    for found in on_ranks(with_options):
        assert {name: error for name, error in found.items() if not error <= 1e-12} == {}


def weighted_mean(predictions: Tensor, weights: Tensor) -> Tensor:
    return (predictions.squeeze(1) * weights).sum()


def new_scorer(combination: Any = "mean", **options: Any) -> gradhooks.MultiPose:
    torch.manual_seed(0)
    return gradhooks.MultiPose(Model().double(), combination, process_group=dist.group.WORLD, **options)


def weights_of_all_poses(rank: int) -> float:
    scorer, poses = new_scorer(weighted_mean), poses_of(0, 5)
    reference = copy.deepcopy(scorer.model)
    weights = torch.arange(5.0, dtype=torch.float64)
    scorer(share_of(poses, [2, 3], rank), weights=weights).combined.backward()
    weighted_mean(torch.stack([reference(pose) for pose in poses]), weights).backward()
    return deviation(scorer.model, reference)


def test_arguments_of_the_combination_are_those_of_all_poses() -> None:
    assert max(on_ranks(weights_of_all_poses)) <= 1e-12


def skipped(rank: int, accumulator: str) -> tuple[int, int]:
    """Rank 1 has the only pose that matters."""
    scorer = new_scorer(weighted_mean, accumulator=accumulator)
    weights = torch.tensor([1e-20, 1e-20, 1.0, 1e-20], dtype=torch.float64)
    scorer(share_of(poses_of(0, 4), [2, 2], rank), weights=weights).combined.backward()
    return scorer.report.backwards, scorer.report.skipped


def test_a_pose_is_skipped_by_its_weight_among_those_of_all_ranks() -> None:
    assert on_ranks(skipped, "recompute") == [(0, 2), (1, 1)]


def predicted(rank: int) -> list[Any]:
    scorer, poses = new_scorer("max"), poses_of(0, 3)
    with torch.no_grad():
        combined, predictions = scorer(share_of(poses, [0, 3], rank))
        same = torch.equal(predictions, torch.stack([scorer.model(pose) for pose in poses]))
    return [same, combined.requires_grad, scorer(share_of(poses, [0, 3], rank)).coefficients().shape]


def test_every_rank_gets_all_predictions() -> None:
    assert on_ranks(predicted) == [[True, False, (3, 1)]] * 2


def dropped(rank: int) -> float:
    scorer, poses = new_scorer("boltzmann", nonfinite="drop"), poses_of(0, 4)
    reference = copy.deepcopy(scorer.model)
    broken = [poses[0] * float("nan"), *poses]
    scorer(share_of(broken, [2, 3], rank)).combined.backward()
    full_graph(reference, poses, COMBINATIONS["boltzmann"]()).combined.backward()
    return deviation(scorer.model, reference)


def test_a_pose_that_is_not_finite_is_left_out_on_all_ranks() -> None:
    assert max(on_ranks(dropped)) <= 1e-12


def again(rank: int, accumulator: str) -> float:
    """Two groups in one backward, twice."""
    scorer = new_scorer("boltzmann", accumulator=accumulator)
    reference, groups = copy.deepcopy(scorer.model), [poses_of(0, 4), poses_of(1, 3)]
    loss = sum((of_both(scorer(share_of(poses, [1, 3], rank))) for poses in groups), torch.zeros(()))
    loss.backward(retain_graph=True)
    loss.backward()
    made = COMBINATIONS["boltzmann"]()
    (2 * sum((of_both(full_graph(reference, poses, made)) for poses in groups), torch.zeros(()))).backward()
    return deviation(scorer.model, reference)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_several_groups_and_a_second_backward(accumulator: str) -> None:
    assert max(on_ranks(again, accumulator)) <= 1e-12


def collectives(rank: int, count: int, accumulator: str) -> int:
    scorer = new_scorer("boltzmann", accumulator=accumulator)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        of_both(scorer(share_of(poses_of(0, 2 * count), [count, count], rank))).backward()
    return sum(event.count for event in watched.key_averages() if event.key.startswith("gloo:"))


def collectives_by_size(rank: int, accumulator: str) -> list[int]:
    return [collectives(rank, count, accumulator) for count in (1, 25)]


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_what_travels_does_not_depend_on_the_number_of_poses(accumulator: str) -> None:
    # Counts, what predictions look like, the predictions; how the backward went, the gradient.
    assert on_ranks(collectives_by_size, accumulator) == [[5, 5], [5, 5]]

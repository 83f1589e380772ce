"""Pose parallel: every rank has the gradients of one process that runs all poses of the group."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from training_reference import COMBINATIONS

import gradhooks
from gradhooks.testing import full_graph

ACCUMULATORS = ("auto", "stream", "recompute", "store")
# Numbers of poses of each rank.
COUNTS = {2: [[3, 4], [0, 5], [1, 0]], 4: [[2, 0, 3, 1], [0, 0, 0, 2]]}
TOLERANCE = 1e-12


class Model(nn.Module):
    """One layer is used only by poses whose first number is large, another one by none."""

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


def new_poses(seed: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def poses_of_rank(poses: list[Tensor], counts: list[int], rank: int) -> list[Tensor]:
    return poses[sum(counts[:rank]) : sum(counts[: rank + 1])]


def of_combined(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum()


def of_poses(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return (prediction.per_pose.tanh() * torch.arange(1.0, 1 + len(prediction.per_pose)).unsqueeze(1)).sum()


def of_both(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return of_combined(prediction) + of_poses(prediction)


LOSSES = (of_combined, of_poses, of_both)


def deviation(model: nn.Module, reference: nn.Module) -> float:
    """Return the largest deviation of a parameter or gradient; infinite if a gradient is None in one model only."""
    largest = 0.0
    for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
        if (actual.grad is None) != (expected.grad is None):
            return float("inf")
        pairs = [(actual, expected)]
        if actual.grad is not None and expected.grad is not None:
            pairs.append((actual.grad, expected.grad))
        largest = max([largest, *((one - other).abs().max().item() for one, other in pairs)])
    return largest


class Pair(nn.Module):
    """A model and its combination, which are trained together."""

    def __init__(self, model: nn.Module, combination: str) -> None:
        super().__init__()
        self.model, self.combination = model, COMBINATIONS[combination]()


def train(
    rank: int,
    counts: list[int],
    combination: str,
    loss: Callable[..., Tensor],
    *,
    accumulators: tuple[str, ...] = ACCUMULATORS,
    model: Callable[[], nn.Module] = Model,
    **options: Any,
) -> dict[str, float]:
    """Train for three steps; return the deviation from the full graph in a single process, by accumulator."""
    torch.manual_seed(0)
    reference = Pair(model(), combination).double()
    pairs = {accumulator: copy.deepcopy(reference) for accumulator in accumulators}
    scorers = {
        accumulator: gradhooks.MultiPose(
            pair.model, pair.combination, accumulator=accumulator, process_group=dist.group.WORLD, **options
        )
        for accumulator, pair in pairs.items()
    }
    optimizers = {pair: torch.optim.SGD(pair.parameters(), 0.05) for pair in (reference, *pairs.values())}
    errors = dict.fromkeys(accumulators, 0.0)
    for step in range(3):
        poses = new_poses(step, sum(counts))
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss(full_graph(reference.model, poses, reference.combination)).backward()
        for accumulator, scorer in scorers.items():
            prediction = scorer(poses_of_rank(poses, counts, rank))
            assert len(prediction.per_pose) == sum(counts)
            loss(prediction).backward()
            errors[accumulator] = max(errors[accumulator], deviation(pairs[accumulator], reference))
        for optimizer in optimizers.values():
            optimizer.step()
    return errors


def train_all(rank: int, all_counts: list[list[int]], combinations: list[str], every_loss: bool) -> dict[str, float]:
    """Train with all counts and combinations, with every loss or with the next one each time."""
    turns = itertools.cycle(LOSSES)
    return {
        f"{counts} {accumulator} {combination} {loss.__name__}": error
        for counts in all_counts
        for combination in combinations
        for loss in (LOSSES if every_loss else [next(turns)])
        for accumulator, error in train(rank, counts, combination, loss).items()
    }


COMBINED_BY = ["mean", "min", "boltzmann learnable", "attention"]


@pytest.mark.parametrize(
    ("world_size", "combinations", "every_loss"),
    [
        (2, COMBINED_BY, False),
        pytest.param(2, COMBINED_BY, True, marks=pytest.mark.long),
        pytest.param(4, ["boltzmann"], True, marks=pytest.mark.long),
    ],
)
def test_every_rank_has_the_gradients_of_one_process(
    world_size: int, combinations: list[str], every_loss: bool
) -> None:
    all_counts = COUNTS[world_size]
    for errors in run_on_ranks(train_all, all_counts, combinations, every_loss, world_size=world_size, timeout=120):
        assert len(errors) == len(all_counts) * len(combinations) * len(ACCUMULATORS) * (3 if every_loss else 1)
        assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def train_inside_data_parallel(_: int) -> dict[str, float]:
    """Split each of two groups over two ranks, inside DDP over four; return the deviation from a single process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("groups", "poses"))
    return {accumulator: train_on_mesh(mesh, accumulator) for accumulator in ACCUMULATORS}


def train_on_mesh(mesh: Any, accumulator: str) -> float:
    torch.manual_seed(0)
    model = Model().double()
    reference = copy.deepcopy(model)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, process_group=mesh["poses"])
    wrapped = DistributedDataParallel(scorer, find_unused_parameters=True)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, reference)]
    largest = 0.0
    for step in range(3):
        groups = [new_poses(10 * step + index, 4 + index) for index in range(2)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        index, member = mesh.get_coordinate()
        of_both(wrapped(poses_of_rank(groups[index], [3, 1 + index], member))).backward()
        for poses in groups:
            (of_both(full_graph(reference, poses, COMBINATIONS["boltzmann"]())) / 2).backward()
        assert sum(parameter.grad is not None for parameter in model.parameters()) >= 4
        for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
            gradients = [torch.zeros(()) if each.grad is None else each.grad for each in (actual, expected)]
            largest = max(largest, (gradients[0] - gradients[1]).abs().max().item())
        for optimizer in optimizers:
            optimizer.step()
    return largest


def test_with_data_parallel_training_on_a_mesh() -> None:
    for errors in run_on_ranks(train_inside_data_parallel, world_size=4):
        assert list(errors) == list(ACCUMULATORS)
        assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def train_with_options(rank: int) -> dict[str, float]:
    batch: dict[str, Any] = {"model": Batched, "collate": torch.stack}
    cases: dict[str, tuple[str, str, Callable[..., Tensor], dict[str, Any]]] = {
        "chunks": ("auto", "boltzmann", of_both, {"chunk_size": 2, **batch}),
        "chunks, store": ("store", "mean", of_both, {"chunk_size": 2, **batch}),
        "chunks of 4, recompute": ("recompute", "max", of_both, {"chunk_size": 4, **batch}),
        "zero tolerance": ("stream", "min", of_combined, {"tolerance": 0.0}),
        "vectors": ("auto", "mean", of_combined, {"model": Vectors}),
    }
    return {
        name: train(rank, [3, 4], combination, loss, accumulators=(accumulator,), **options)[accumulator]
        for name, (accumulator, combination, loss, options) in cases.items()
    }


def test_options() -> None:
    for errors in run_on_ranks(train_with_options):
        assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def weighted_mean(predictions: Tensor, weights: Tensor) -> Tensor:
    return (predictions.squeeze(1) * weights).sum()


def new_scorer(combination: Any = "mean", **options: Any) -> gradhooks.MultiPose:
    torch.manual_seed(0)
    return gradhooks.MultiPose(Model().double(), combination, process_group=dist.group.WORLD, **options)


def pass_weights(rank: int) -> float:
    scorer, poses = new_scorer(weighted_mean), new_poses(0, 5)
    reference = copy.deepcopy(scorer.model)
    weights = torch.arange(5.0, dtype=torch.float64)
    scorer(poses_of_rank(poses, [2, 3], rank), weights=weights).combined.backward()
    weighted_mean(torch.stack([reference(pose) for pose in poses]), weights).backward()
    return deviation(scorer.model, reference)


def test_arguments_of_the_combination_have_a_row_for_every_pose() -> None:
    assert max(run_on_ranks(pass_weights)) <= TOLERANCE


def count_backwards(rank: int, accumulator: str) -> tuple[int, int]:
    """Run a group in which one pose of rank 1 has a significant weight and no other pose has."""
    scorer = new_scorer(weighted_mean, accumulator=accumulator)
    weights = torch.tensor([1e-20, 1e-20, 1.0, 1e-20], dtype=torch.float64)
    scorer(poses_of_rank(new_poses(0, 4), [2, 2], rank), weights=weights).combined.backward()
    return scorer.report.backwards, scorer.report.skipped


def test_skipping_compares_coefficients_of_all_ranks() -> None:
    assert run_on_ranks(count_backwards, "recompute") == [(0, 2), (1, 1)]


def predict(rank: int) -> list[Any]:
    scorer, poses = new_scorer("max"), new_poses(0, 3)
    with torch.no_grad():
        combined, predictions = scorer(poses_of_rank(poses, [0, 3], rank))
        equal = torch.equal(predictions, torch.stack([scorer.model(pose) for pose in poses]))
    return [equal, combined.requires_grad, scorer(poses_of_rank(poses, [0, 3], rank)).coefficients().shape]


def test_every_rank_gets_all_predictions() -> None:
    assert run_on_ranks(predict) == [[True, False, (3, 1)]] * 2


def drop_nonfinite(rank: int) -> float:
    scorer, poses = new_scorer("boltzmann", nonfinite="drop"), new_poses(0, 4)
    reference = copy.deepcopy(scorer.model)
    with_nan = [poses[0] * float("nan"), *poses]
    scorer(poses_of_rank(with_nan, [2, 3], rank)).combined.backward()
    full_graph(reference, poses, COMBINATIONS["boltzmann"]()).combined.backward()
    return deviation(scorer.model, reference)


def test_nonfinite_predictions_are_dropped_on_all_ranks() -> None:
    assert max(run_on_ranks(drop_nonfinite)) <= TOLERANCE


def backward_twice(rank: int) -> dict[str, float]:
    """Run two groups and call one backward for both, twice."""
    errors = {}
    for accumulator in ACCUMULATORS:
        scorer = new_scorer("boltzmann", accumulator=accumulator)
        reference, groups = copy.deepcopy(scorer.model), [new_poses(0, 4), new_poses(1, 3)]
        loss = sum((of_both(scorer(poses_of_rank(poses, [1, 3], rank))) for poses in groups), torch.zeros(()))
        loss.backward(retain_graph=True)
        loss.backward()
        combination = COMBINATIONS["boltzmann"]()
        losses = (of_both(full_graph(reference, poses, combination)) for poses in groups)
        (2 * sum(losses, torch.zeros(()))).backward()
        errors[accumulator] = deviation(scorer.model, reference)
    return errors


def test_several_groups_and_a_second_backward() -> None:
    for errors in run_on_ranks(backward_twice):
        assert list(errors) == list(ACCUMULATORS)
        assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def count_collectives(rank: int, count: int, accumulator: str) -> int:
    scorer = new_scorer("boltzmann", accumulator=accumulator)
    of_both(scorer(poses_of_rank(new_poses(0, 2 * count), [count, count], rank))).backward()  # with the audit
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        of_both(scorer(poses_of_rank(new_poses(0, 2 * count), [count, count], rank))).backward()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("gloo:"))


def count_all_collectives(rank: int) -> dict[str, list[int]]:
    """Return the numbers of collectives with few and many poses, by accumulator."""
    return {
        accumulator: [count_collectives(rank, count, accumulator) for count in (1, 25)] for accumulator in ACCUMULATORS
    }


def test_number_of_collectives_does_not_depend_on_the_number_of_poses() -> None:
    # Pose counts, metadata, predictions; status of the backward, gradient.
    assert run_on_ranks(count_all_collectives) == [{accumulator: [5, 5] for accumulator in ACCUMULATORS}] * 2

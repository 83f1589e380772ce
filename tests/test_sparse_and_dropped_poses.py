"""Sparse gradients stay sparse, and dropped poses do not touch the other poses of their chunk."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from chosen_device import DEVICE
from grouped_combinations import EachGroup, engine_with_groups
from small_model import assert_gradients_close, small_mlp
from stream_combinations import gradhooks_warnings
from torch import Tensor, nn

import gradhooks
from gradhooks.testing import full_graph

ACCUMULATORS = ["stream", "store", "recompute", "auto"]


class NoisyRows(nn.Module):
    """Random numbers in each forward: a chunk cannot be run again without one of its poses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, poses: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.first(poses).tanh(), 0.3)).squeeze(-1)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", ["mean", "boltzmann"])
def test_poses_dropped_from_chunks_of_a_model_with_dropout(combination: str, accumulator: str) -> None:
    model, poses = NoisyRows().to(DEVICE, torch.float64), torch.randn(7, 4, dtype=torch.float64).to(DEVICE)
    poses[3] = torch.nan
    combiner = gradhooks.registry.combinations.create(combination)
    torch.manual_seed(2)
    rows = [model(pose.unsqueeze(0)) for pose in poses]
    combiner(torch.cat([*rows[:3], *rows[4:]])).square().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.manual_seed(2)
    scorer = gradhooks.MultiPose(
        model, combiner, accumulator=accumulator, chunk_size=3, nonfinite="drop", memory=0, audit=False
    )
    scorer(poses).combined.square().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
    assert scorer.report.chunks == len(poses)


class Words(nn.Module):
    """A sparse embedding, used by poses that have a word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, sparse=True)
        self.last = nn.Linear(3, 1)

    def forward(self, word: int, height: float) -> Tensor:
        hidden = torch.full((3,), height, dtype=self.last.weight.dtype)
        return self.last(hidden + 0.01 * self.embedding(torch.tensor(word)) if word >= 0 else hidden) + height


def steps(combination: Any, poses: list[tuple[int, float]], loss: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the gradient of the embedding by gradhooks and by the full graph."""
    torch.manual_seed(1)
    model = Words().double()
    reference = copy.deepcopy(model)
    loss(gradhooks.MultiPose(model, combination, **options)(poses)).backward()
    loss(full_graph(reference, poses, combination)).backward()
    assert model.embedding.weight.grad is not None
    assert reference.embedding.weight.grad is not None
    return model.embedding.weight.grad, reference.embedding.weight.grad


@pytest.mark.parametrize("accumulator", ["stream", "store"])
@pytest.mark.parametrize("combination", ["mean", "min", "boltzmann"])
def test_sparse_gradients_stay_sparse(combination: str, accumulator: str) -> None:
    combiner = gradhooks.registry.combinations.create(combination)
    all_use_it = [(word % 5, 0.1 * word) for word in range(7)]
    last_uses_it = [(-1, 0.0), (-1, 0.1), (3, 40.0)]  # which a minimum skips
    first_uses_it = [(2, 40.0), (-1, 0.1), (-1, 0.0)]  # whose sum a minimum drops

    def on_combined(prediction: gradhooks.MultiPosePrediction) -> Tensor:
        return prediction.combined.sum()

    def on_first_pose(prediction: gradhooks.MultiPosePrediction) -> Tensor:
        return prediction.per_pose[0].sum()

    for poses in (all_use_it, last_uses_it, first_uses_it):
        for loss in (on_combined, on_first_pose):
            found, expected = steps(combiner, poses, loss, accumulator=accumulator)
            assert found.is_sparse
            assert expected.is_sparse
            torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-14)


def test_sparse_sums_of_groups() -> None:
    poses = [(word % 5, 0.1 * word) for word in range(7)]
    groups = [0, 1, 0, 1, 1, 2, 0]
    for combination in (gradhooks.combinations.Mean(), gradhooks.combinations.Boltzmann()):
        with engine_with_groups(groups):
            found, expected = steps(
                EachGroup(combination, groups),
                poses,
                lambda prediction: prediction.combined.square().sum(),
                accumulator="stream",
            )
        assert found.is_sparse
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-14)


# -- dropped poses --------------------------------------------------------------------------------------------------


class SometimesNaN(nn.Module):
    """Predicts NaN for poses that begin with 0, by way of every parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_mlp()

    def forward(self, poses: Tensor) -> Tensor:
        prediction: Tensor = self.inner(torch.where(poses[..., :1] == 0, torch.nan, poses))
        return prediction


def poses_with_dropped(*dropped: int) -> Tensor:
    poses = torch.randn(7, 4, dtype=torch.float64).to(DEVICE)
    poses[list(dropped), 0] = 0
    return poses


@pytest.mark.parametrize("dropped", [(1,), (0, 4), (0, 1, 2, 5)])
@pytest.mark.parametrize("combination", ["mean", "min", "boltzmann"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_dropped_poses_do_not_touch_their_chunk(accumulator: str, combination: str, dropped: tuple[int, ...]) -> None:
    model, poses = SometimesNaN(), poses_with_dropped(*dropped)
    reference = copy.deepcopy(model)
    rest = [pose for index, pose in enumerate(poses) if index not in dropped]
    combiner = gradhooks.registry.combinations.create(combination)
    full_graph(reference, rest, combiner).combined.sum().backward()
    scorer = gradhooks.MultiPose(model, combiner, accumulator=accumulator, nonfinite="drop", chunk_size=3)
    with gradhooks_warnings() as messages:
        scorer(poses).combined.sum().backward()
    assert_gradients_close(model, reference)
    assert messages == []


class Signs(gradhooks.GradientCombination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> dict[str, Tensor]:
        assert predictions.isfinite().all()
        assert len(coefficients) == len(predictions)
        return {name: rows.sign().sum(0) * len(rows) for name, rows in gradients.items()}


def test_gradients_that_are_combined_carry_no_scale_of_float16() -> None:
    class Sum(Signs):
        def combine_gradients(self, gradients: Mapping[str, Tensor], *_: Tensor) -> dict[str, Tensor]:
            return {name: rows.sum(0) for name, rows in gradients.items()}

    model, poses = nn.Linear(4, 1).half(), torch.ones(3, 4).half()
    gradhooks.MultiPose(model, Sum())(poses).combined.sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[3.0] * 4]


def test_dropped_poses_are_no_part_of_the_gradients_that_are_combined() -> None:
    model, poses = SometimesNaN(), poses_with_dropped(1, 4)
    reference = copy.deepcopy(model)
    for chunk_size in (1, 3):
        model.zero_grad()
        scorer = gradhooks.MultiPose(model, Signs(), nonfinite="drop", chunk_size=chunk_size)
        scorer(poses).combined.sum().backward()
        rows = []
        for index in (0, 2, 3, 5, 6):
            reference.zero_grad()
            reference(poses[index]).sum().backward()
            rows.append([parameter.grad for parameter in reference.parameters()])
        for parameter, column in zip(model.parameters(), zip(*rows, strict=True), strict=True):
            torch.testing.assert_close(parameter.grad, 5 * torch.stack(column).sign().sum(0))

"""The second run packs significant poses into full chunks, unless predictions depend on the other poses of a chunk."""

import copy
from typing import Any

import pytest
import torch
from model_zoo import TensorFactory, mlp
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import Gradients, assert_bit_equal, assert_same_gradients, gradients_of
from unwatched import Unwatched

import gradhooks
from gradhooks.testing import full_graph


class Counting(nn.Module):
    """Records the size of each chunk that runs with a graph."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), inner or nn.Tanh(), nn.Linear(6, 1)
        self.log = Unwatched(chunk_sizes=[])

    def forward(self, features: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.log.chunk_sizes.append(len(features))
        return self.last(self.inner(self.first(features)))


def loss_on_some(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.per_pose[[1, 5, 6, 11, 14, 15]].square().sum()


def second_run(model: nn.Module, size: int, loss: Any, poses: Tensor) -> tuple[Gradients, list[int]]:
    """Return the gradients, and the sizes of the chunks of the second run."""
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", chunk_size=size)
    prediction = scorer(poses)
    model.log.chunk_sizes.clear()
    loss(prediction).backward()
    return gradients_of(dict(model.named_parameters())), list(model.log.chunk_sizes)


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 6), (2, [2] * 3), (4, [4, 2]), (16, [6])])
def test_significant_poses_are_packed(size: int, sizes: list[int], double: TensorFactory) -> None:
    model = Counting().to(double.device, double.dtype)
    reference, poses = copy.deepcopy(model), double.randn(16, 4)
    loss_on_some(
        full_graph(reference, list(poses[:, None]), torch.mean, call=lambda net, pose: net(pose)[0])
    ).backward()
    result, second_sizes = second_run(model, size, loss_on_some, poses)
    assert second_sizes == sizes
    assert_same_gradients(result, gradients_of(dict(reference.named_parameters())))


def test_if_all_poses_are_significant_the_chunks_and_every_bit_stay(single: TensorFactory) -> None:
    model = Counting().to(single.device, single.dtype)
    reference, poses = copy.deepcopy(model), single.randn(10, 4)
    predictions = torch.cat([reference(poses[start : start + 4]) for start in (0, 4, 8)])
    predictions.square().sum().backward()
    result, second_sizes = second_run(model, 4, lambda prediction: prediction.per_pose.square().sum(), poses)
    assert second_sizes == [2, 4, 4]
    assert_bit_equal(result, gradients_of(dict(reference.named_parameters())))


class BatchScaled(nn.Module):
    """Each row depends on the others, although there is no buffer and no random number."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows / (1 + rows.abs().mean(0))


@pytest.mark.parametrize(
    "inner",
    [lambda: nn.BatchNorm1d(6), lambda: nn.Dropout(0.5), BatchScaled],
    ids=["batch norm", "dropout", "scaled by the batch"],
)
@pytest.mark.parametrize("size", [4, 2])
def test_chunks_whose_poses_depend_on_each_other_are_not_packed(size: int, inner: Any, double: TensorFactory) -> None:
    manual_seed(1)
    model = Counting(inner()).to(double.device, double.dtype)
    reference, poses = copy.deepcopy(model), double.randn(16, 4)
    manual_seed(2)
    rows = [reference(poses[start : start + size]) for start in range(0, 16, size)]
    torch.cat(rows)[[1, 5, 6, 11, 14, 15]].square().sum().backward()
    for _ in range(2):
        manual_seed(2)
        model.zero_grad()
        result, second_sizes = second_run(model, size, loss_on_some, poses)
        assert_same_gradients(result, gradients_of(dict(reference.named_parameters())))
    assert second_sizes[-1] == size


def test_dependence_on_the_chunk_is_detected_once(double: TensorFactory) -> None:
    model = Counting(BatchScaled()).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", chunk_size=4)
    poses = double.randn(16, 4)
    runs = []
    for _ in range(3):
        prediction = scorer(poses)
        model.log.chunk_sizes.clear()
        loss_on_some(prediction).backward()
        runs.append(list(model.log.chunk_sizes))
        assert (scorer.report.backwards, scorer.report.recomputed) == (6, 6)
    assert runs == [[4, 2, 4, 4, 4, 4], [4, 4, 4, 4], [4, 4, 4, 4]]


def test_an_error_names_the_index_of_a_packed_pose(double: TensorFactory) -> None:
    model = Counting().to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", chunk_size=2)
    prediction = scorer(double.randn(16, 4))
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        loss_on_some(prediction).backward()
    if hasattr(caught.value, "__notes__"):
        assert "this was pose 14 of 16" in caught.value.__notes__[0]


def test_a_leaf_reached_only_by_skipped_poses_gets_zeros(double: TensorFactory) -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.usual, self.special = mlp(4, 1), mlp(4, 1)

        def forward(self, features: Tensor) -> Tensor:
            rows = self.usual(features)
            return rows + self.special(features) if (features[:, 0] == 9).any() else rows

    model = Branched().to(double.device, double.dtype)
    poses = double.randn(8, 4)
    poses[2, 0] = 9
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", chunk_size=2)
    scorer(poses).per_pose[5].sum().backward()
    gradients = [leaf.grad for leaf in model.special.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)

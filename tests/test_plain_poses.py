"""Poses that run plainly are PyTorch: what is native, what depends on chunks, and what happens after errors."""
# ruff: noqa: ARG004

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from chosen_device import DEVICE, needs
from memory_budgets import COUNT, SHARES, graph_bytes, rows
from model_state import unchanged
from model_zoo import TensorFactory, build
from seeding import manual_seed
from small_model import small_mlp
from torch import Tensor, nn
from training_reference import COMBINATIONS, Gradients, assert_same_gradients, gradients_of, loss_on_both

import gradhooks
from gradhooks.testing import full_graph

# -- predictions that depend on their chunk --------------------------------------------------------------------------


class Normalized(nn.Module):
    def __init__(self, probability: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(probability), nn.Linear(6, 1))
        self.to(DEVICE, torch.float64)

    def forward(self, poses: Tensor) -> Tensor:
        return self.layers(poses)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_chunks_of_one_where_predictions_depend_on_their_chunk(probability: float) -> None:
    manual_seed(5)
    model, sizes = Normalized(probability), list[int]()

    def call(model: nn.Module, poses: Tensor) -> Tensor:
        sizes.append(len(poses))
        factors = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, device=DEVICE).repeat(len(poses)).unsqueeze(1)
        prediction: Tensor = model(poses.repeat_interleave(3, 0) * factors)
        return prediction[::3]

    scorer = gradhooks.MultiPose(model, call=call)
    scorer(rows()).combined.sum().backward()
    assert sizes[:3] == [2, 1, 2]  # a pair, for the number of rows; a pose alone and a pair
    assert max(sizes[4:]) == 1
    assert scorer.report.chunks == COUNT
    scorer.chunk_size = 4
    sizes.clear()
    scorer(rows())
    assert sizes == [4, 4, 4, 4, 4, 2]


def test_chunks_in_evaluation_after_training() -> None:
    model = Normalized(0.0)
    scorer = gradhooks.MultiPose(model, collate=torch.stack, chunk_size=4)
    scorer([*rows()])
    model(rows())  # kernels write the statistics without a sign
    model.eval()
    scorer.chunk_size = None
    with unchanged(model):
        scorer([*rows()])
    assert scorer.report.chunks == 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 2.0])
def test_chunks_of_a_fixed_size_are_not_split(share: float) -> None:
    """With batch normalization in training, another chunk would be another prediction."""
    manual_seed(5)
    model, plain = Normalized(0.0), Normalized(0.0)
    plain.load_state_dict(model.state_dict())
    chunks = rows().split(11)
    predictions = torch.cat([plain(chunk) for chunk in chunks])
    predictions.square().sum().backward()
    scorer = gradhooks.MultiPose(model, combination=None, memory=int(share * 8 * graph_bytes()), chunk_size=11)
    for _ in range(2):
        model.zero_grad()
        prediction = scorer(rows())
        torch.testing.assert_close(prediction.per_pose, predictions, rtol=1e-12, atol=1e-14)
        prediction.per_pose.square().sum().backward()
        assert_same_gradients(*(gradients_of(dict(each.named_parameters())) for each in (model, plain)), 1e-10)
    assert scorer.report.plain == {0.0: 0, 2.0: COUNT}.get(share, scorer.report.plain)


@pytest.mark.parametrize("share", SHARES)
def test_a_frozen_model_predicts(share: float) -> None:
    model = small_mlp().requires_grad_(False)
    scorer = gradhooks.MultiPose(model, "boltzmann", memory=int(share * graph_bytes()))
    prediction = scorer(rows())
    assert not prediction.combined.requires_grad
    torch.testing.assert_close(prediction.per_pose, model(rows()), rtol=1e-12, atol=1e-14)


# -- poses that the model changes in place --------------------------------------------------------------------------


class Doubling(nn.Module):
    """Changes its poses in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, poses: Tensor) -> Tensor:
        prediction: Tensor = self.net(poses.mul_(2).clone())
        return prediction


def test_poses_changed_in_place_once_as_in_pytorch() -> None:
    model, poses = Doubling(), rows()
    scorer = gradhooks.MultiPose(model)
    prediction = scorer(poses)
    assert torch.equal(poses, 2 * rows())  # not once more for what is found out about the model
    assert scorer.report.chunks == 2
    torch.testing.assert_close(prediction.per_pose, model.net(2 * rows()), rtol=1e-12, atol=1e-14)


def test_a_batch_does_not_start_again_with_changed_poses() -> None:
    with pytest.raises(gradhooks.errors.PosesError, match=r"pose 0: the model changed .* in place"):
        gradhooks.MultiPose(Doubling(), memory=int(0.7 * graph_bytes()))(rows())


def test_a_batch_that_cannot_be_measured_does_not_start_again_with_changed_poses() -> None:
    def call(model: nn.Module, poses: Tensor) -> Tensor:
        poses.mul_(2)
        slope = torch.func.grad(lambda value: model(value).sum())  # refuses hooks, so that a second attempt is made
        return slope(poses.clone()).square().sum(-1, keepdim=True)

    with pytest.raises(gradhooks.errors.PosesError, match=r"the model changed .* in place"):
        gradhooks.MultiPose(small_mlp(), call=call)(rows())


# -- what is native when everything fits ----------------------------------------------------------------------------


class SideLoss(nn.Module):
    """Leaves a loss in an attribute, and uses a leaf that is not registered."""

    def __init__(self, outside: Tensor) -> None:
        super().__init__()
        self.net = small_mlp()
        self.fetch = lambda: outside
        self.side: list[Tensor] = []

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.net(pose * self.fetch())
        self.side.append(hidden.square().sum())
        return hidden


def side_loss_step(run: Any) -> list[Tensor]:
    manual_seed(5)
    outside = torch.randn(4, dtype=torch.float64).to(DEVICE).requires_grad_()
    model = SideLoss(outside)
    combined = run(model)
    (combined.sum() + sum(model.side, torch.zeros(()))).backward()
    return [leaf.grad for leaf in [outside, *model.parameters()] if leaf.grad is not None]


def test_side_losses_and_outside_leaves() -> None:
    result = side_loss_step(lambda model: gradhooks.MultiPose(model)(list(rows())).combined)
    expected = side_loss_step(lambda model: full_graph(model, list(rows()), COMBINATIONS["mean"]()).combined)
    assert len(result) == 5
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def test_derivatives_of_the_gradient() -> None:
    def penalty(model: nn.Module, combined: Tensor) -> Gradients:
        gradients = torch.autograd.grad(combined.sum(), list(model.parameters()), create_graph=True)
        torch.stack([each.square().sum() for each in gradients]).sum().backward()
        return gradients_of(dict(model.named_parameters()))

    model = small_mlp()
    reference = copy.deepcopy(model)
    result = penalty(model, gradhooks.MultiPose(model, "boltzmann")(rows()).combined)
    expected = penalty(reference, full_graph(reference, rows(), COMBINATIONS["boltzmann"]()).combined)
    assert_same_gradients(result, expected, tolerance=1e-10)


class Clipped(torch.autograd.Function):
    """The identity, whose backward is not linear."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.01, 0.01)


def test_a_backward_that_is_not_linear() -> None:
    model = small_mlp()
    reference = copy.deepcopy(model)

    def call(model: nn.Module, pose: Tensor) -> Tensor:
        return Clipped.apply(model(pose))

    loss_on_both(gradhooks.MultiPose(model, "boltzmann", call=call)(rows())).backward()
    loss_on_both(full_graph(reference, rows(), COMBINATIONS["boltzmann"](), call=call)).backward()
    assert_same_gradients(*(gradients_of(dict(each.named_parameters())) for each in (model, reference)))


@pytest.mark.parametrize("share", [0.7, 2.0])
def test_a_change_in_place_between_forward_and_backward(share: float) -> None:
    needs("errors in hooks of a backward")
    model, poses = small_mlp(), rows()
    loss = gradhooks.MultiPose(model, memory=int(share * graph_bytes()))(poses).combined.sum()
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = gradhooks.MultiPose(model)(poses).combined.sum()
    poses.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- errors ---------------------------------------------------------------------------------------------------------


@contextmanager
def state_of(model: nn.Module) -> Iterator[None]:
    buffers, random_state = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    yield
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("fails_at", [0, 1, 4, 7])
@pytest.mark.parametrize("memory", [2000, 8000, "1GiB"])
def test_an_exception_restores_buffers_and_random_state(memory: Any, fails_at: int, double: TensorFactory) -> None:
    case = build("batch_norm_in_training", double)
    poses = case.make_poses(8)

    def call(model: nn.Module, pose: Any) -> Tensor:
        torch.rand(())
        prediction = case.call(model, pose)
        if pose is poses[fails_at]:
            raise ArithmeticError("injected")
        return prediction

    scorer = gradhooks.MultiPose(case.model, memory=memory, call=call)
    with state_of(case.model), pytest.raises(ArithmeticError, match="injected"):
        scorer(poses)
    scorer.call = case.call
    scorer(poses).combined.sum().backward()


def test_nothing_is_kept_of_a_prediction_that_is_dropped() -> None:
    scorer = gradhooks.MultiPose(small_mlp(), memory=100_000)
    for _ in range(300):
        scorer(rows())
        assert scorer.report.plain == COUNT
    assert scorer._parts.open_graphs.bytes == 0

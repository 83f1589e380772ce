"""A group changes the model as N plain forwards and one backward do, and nothing else."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from model_state import hook_counts, structure_unchanged
from model_zoo import ZOO, ModelCase, TensorFactory, build
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    Gradients,
    TrainingResult,
    assert_same_gradients,
    gradients_of,
    loss_on_both,
    loss_on_combined,
    train_full_graph,
    train_multi_pose,
)

import gradhooks


@functools.cache
def full_graph_gradients(name: str, factory: TensorFactory, combination: str = "min", count: int = 4) -> Gradients:
    return train_full_graph(build(name, factory), COMBINATIONS[combination], loss_on_both, count).gradients


@pytest.mark.parametrize("accumulator", CONCRETE_ACCUMULATORS)
@pytest.mark.parametrize("name", ZOO)
def test_a_step_changes_values_only(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    with structure_unchanged(case.model):
        train_multi_pose(case, COMBINATIONS["boltzmann"], loss_on_both, 4, accumulator)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_batch_norm_counts_each_pose_once(accumulator: str, double: TensorFactory) -> None:
    case = build("batch_norm_in_training", double)
    train_multi_pose(case, COMBINATIONS["boltzmann"], loss_on_both, 5, accumulator)
    assert case.model.get_buffer("body.1.num_batches_tracked").item() == 5


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_existing_gradients_are_added_to_in_place(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    for parameter in case.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = [parameter.grad for parameter in case.model.parameters()]
    result = train_multi_pose(case, COMBINATIONS["min"], loss_on_both, 5, accumulator)
    for name, gradient in full_graph_gradients("plain_mlp", double, count=5).items():
        assert gradient is not None
        torch.testing.assert_close(result.gradients[name], gradient + 7, rtol=1e-12, atol=1e-12)
    assert [id(parameter.grad) for parameter in case.model.parameters()] == [id(gradient) for gradient in before]


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("accumulator", CONCRETE_ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "batch_norm_in_training", "dropout", "vector_output", "lstm"])
def test_prediction_without_gradients(name: str, accumulator: str, grad_mode: Any, double: TensorFactory) -> None:
    case, plain = build(name, double), build(name, double)
    scorer = gradhooks.MultiPose(case.model, "mean", accumulator=accumulator, call=case.call)
    with grad_mode(), structure_unchanged(case.model):
        manual_seed(3)
        combined, predictions = scorer(case.make_poses(4))
        after = torch.get_rng_state()
        manual_seed(3)
        expected = torch.stack([plain.call(plain.model, pose) for pose in plain.make_poses(4)])
    torch.testing.assert_close(predictions, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined, expected.mean(0), rtol=1e-12, atol=1e-12)
    assert not combined.requires_grad
    assert not predictions.requires_grad
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert torch.equal(after, torch.get_rng_state())
    for buffer_name, buffer in plain.model.named_buffers():
        assert torch.equal(case.model.get_buffer(buffer_name), buffer)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "batch_norm_in_training", "lstm", "tied_weights"])
def test_copies_and_pickles_of_a_trained_model_are_plain(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    keys = list(case.model.state_dict())
    train_multi_pose(case, COMBINATIONS["min"], loss_on_both, 4, accumulator)
    reference = ModelCase(copy.deepcopy(case.model), case.make_poses)
    expected = train_full_graph(reference, COMBINATIONS["min"], loss_on_both, 4)
    for copied in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):  # noqa: S301  # our own
        assert list(copied.state_dict()) == keys
        assert all(hook_counts(parameter) == (0, 0) for parameter in copied.parameters())
        result = train_multi_pose(ModelCase(copied, case.make_poses), COMBINATIONS["min"], loss_on_both, 4, accumulator)
        assert_same_gradients(result.gradients, expected.gradients)


class SavesItself(nn.Module):
    """Saves and copies itself in each forward, as a callback may."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.saved: list[Any] = []

    def forward(self, pose: Tensor) -> Tensor:
        self.saved.append(({name: value.clone() for name, value in self.state_dict().items()}, copy.deepcopy(self.net)))
        return self.net(pose)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_model_saved_in_the_middle_of_a_group(accumulator: str, double: TensorFactory) -> None:
    model = SavesItself().to(double.device, double.dtype)
    combined, _ = gradhooks.MultiPose(model, "mean", accumulator=accumulator)(list(double.randn(4, 4)))
    combined.sum().backward()
    for saved, copied in model.saved:
        assert list(saved) == ["net.weight", "net.bias"]
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
        assert torch.equal(copied.weight, model.net.weight)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "shared_encoder_output", "lstm"])
def test_poses_are_unchanged(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    poses = case.make_poses(4)
    tensors = [tensor for pose in poses for tensor in (pose if isinstance(pose, tuple) else (pose,))]
    before = [
        (tensor.detach().clone(), tensor._version, tensor.requires_grad, hook_counts(tensor)) for tensor in tensors
    ]
    prediction = gradhooks.MultiPose(case.model, "min", accumulator=accumulator, call=case.call)(poses)
    loss_on_both(prediction).backward()
    for tensor, (value, version, requires_grad, hooks) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor._version, tensor.requires_grad, hook_counts(tensor)) == (version, requires_grad, hooks)
        assert not tensor.is_leaf or tensor.grad is None


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_modes_of_autograd_are_untouched(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    with torch.autograd.set_detect_anomaly(False), torch.autocast("cpu", enabled=False):
        before = _modes()
        train_multi_pose(case, COMBINATIONS["min"], loss_on_both, 4, accumulator)
        assert _modes() == before


def _modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
    )


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection(accumulator: str, double: TensorFactory) -> None:
    with torch.autograd.set_detect_anomaly(True):
        result = train_multi_pose(build("plain_mlp", double), COMBINATIONS["min"], loss_on_both, 4, accumulator)
    assert_same_gradients(result.gradients, full_graph_gradients("plain_mlp", double))


@pytest.mark.parametrize("accumulator", CONCRETE_ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "lstm", "transformer_encoder", "vector_output"])
def test_the_second_run_uses_the_autocast_of_the_first(name: str, accumulator: str, single: TensorFactory) -> None:
    result = _forward_under_autocast(name, accumulator, single)
    expected = _forward_under_autocast(name, None, single)
    # The full graph adds the gradients of the poses in bfloat16, behind one cast of each weight.
    assert_same_gradients(result.gradients, expected.gradients, tolerance=0.02)


def _forward_under_autocast(name: str, accumulator: str | None, factory: TensorFactory) -> TrainingResult:
    """Train with a bfloat16 forward and a backward outside of autocast."""
    case = build(name, factory)

    def loss(prediction: gradhooks.MultiPosePrediction) -> Tensor:
        torch.set_autocast_enabled(factory.device.type, False)
        return loss_on_combined(prediction)

    with torch.autocast(factory.device.type, dtype=torch.bfloat16):
        if accumulator is None:
            return train_full_graph(case, COMBINATIONS["boltzmann"], loss, 4)
        return train_multi_pose(case, COMBINATIONS["boltzmann"], loss, 4, accumulator)


class ForcesOfLaterPoses(nn.Module):
    """Creates a leaf and differentiates by it, except for the first poses, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, features: Tensor, forces: bool) -> Tensor:
        energy = self.net(self.norm(features)).mean(0)
        if not forces:
            return energy
        leaf = features.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.net(leaf).square().sum(), leaf, create_graph=True)
        return energy + force.sum() + 0 * leaf.sum()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_leaf_first_created_by_a_later_pose(accumulator: str, double: TensorFactory) -> None:
    model = ForcesOfLaterPoses().to(double.device, double.dtype)
    plain, poses = copy.deepcopy(model), [(double.randn(5, 4), index > 1) for index in range(4)]
    torch.stack([plain(*pose) for pose in poses]).mean().backward()
    gradhooks.MultiPose(model, "mean", accumulator=accumulator)(poses).combined.sum().backward()
    result, expected = gradients_of(dict(model.named_parameters())), gradients_of(dict(plain.named_parameters()))
    assert_same_gradients(result, expected)
    assert all(torch.equal(buffer, dict(plain.named_buffers())[name]) for name, buffer in model.named_buffers())
    assert model.norm.num_batches_tracked == len(poses)

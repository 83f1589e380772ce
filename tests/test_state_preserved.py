"""gradhooks leaves behind what N plain forwards and one backward would have left, and nothing else."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_state import differing, hooks_of, numbers, same_structure, structure, untouched
from model_zoo import ZOO, Place, Specimen, build
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    Trained,
    assert_same_gradients,
    gradients_of,
    leaves_of,
    of_both,
    of_combined,
    train_by_full_graph,
    train_by_group,
)

import gradhooks

# Stateful, random, with flat weights, with several gradients for a leaf, with inputs that require grad.
FRAGILE = [
    "plain_mlp",
    "batch_norm_in_training",
    "dropout",
    "counting_buffer",
    "buffer_that_is_replaced",
    "buffer_written_in_place",
    "spectral_norm_by_parametrization",
    "lstm_with_dropout",
    "tied_in_reentrant_checkpoints",
    "forces_with_dropout",
    "shared_encoder_output",
    "sparse_embedding",
]


class Interruption(Exception):  # noqa: N818  # not an error of anybody's
    pass


def interrupted(specimen: Specimen, at_call: int, fault: BaseException) -> Callable[[nn.Module, Any], Tensor]:
    """A `call` that fails at its call of that number, after the model has run."""
    calls = 0

    def call(model: nn.Module, pose: Any) -> Tensor:
        nonlocal calls
        prediction = specimen.call(model, pose)
        calls += 1
        if calls == at_call + 1:
            raise fault
        return prediction

    return call


def fresh_gradients(specimen: Specimen) -> None:
    """Every other leaf has a gradient already."""
    for place, leaf in enumerate(leaves_of(specimen, None).values()):
        leaf.grad = torch.ones_like(leaf) if place % 2 else None


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ZOO)
def test_after_a_success(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    with same_structure(specimen.model):
        train_by_group(specimen, COMBINATIONS["boltzmann"], of_both, 4, accumulator)


@pytest.mark.parametrize("fault", [Interruption("stop"), KeyboardInterrupt()], ids=["exception", "keyboard"])
@pytest.mark.parametrize("at_pose", [0, 1, 4])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", FRAGILE)
def test_after_an_exception_at_a_pose(
    name: str, accumulator: str, at_pose: int, fault: BaseException, double: Place
) -> None:
    specimen = build(name, double)
    fresh_gradients(specimen)
    scorer = gradhooks.MultiPose(
        specimen.model, "boltzmann", accumulator=accumulator, call=interrupted(specimen, at_pose, fault)
    )
    poses = specimen.make_poses(5)
    with untouched(specimen.model), pytest.raises(type(fault)):
        scorer(poses)
    found = train_by_group(_without_gradients(specimen), COMBINATIONS["boltzmann"], of_both, 5, accumulator)
    expected = train_by_full_graph(build(name, double), COMBINATIONS["boltzmann"], of_both, 5)
    assert_same_gradients(found.gradients, expected.gradients)


def _without_gradients(specimen: Specimen) -> Specimen:
    for leaf in leaves_of(specimen, None).values():
        leaf.grad = None
    return specimen


@pytest.mark.parametrize("accumulator", ["recompute", "stream"])
@pytest.mark.parametrize("name", FRAGILE)
def test_after_an_exception_in_the_outer_backward(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    fresh_gradients(specimen)
    failing = [interrupted(specimen, at_call, Interruption("stop")) for at_call in (0, 2)]
    call = specimen.call
    scorer = gradhooks.MultiPose(
        specimen.model,
        "mean",
        accumulator=accumulator,
        call=lambda *given: call(*given),  # noqa: PLW0108  # `call` changes
    )
    for broken in failing:
        call = specimen.call
        combined, predictions = scorer(specimen.make_poses(5))
        call = broken
        # The direct loss makes stream recompute as well.
        with untouched(specimen.model), pytest.raises(Interruption):
            (combined.sum() + predictions.square().sum()).backward()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_after_an_exception_in_the_combination_or_the_loss(accumulator: str, double: Place) -> None:
    specimen = build("plain_mlp", double)

    def broken(_: Tensor) -> Tensor:
        raise Interruption("stop")

    with untouched(specimen.model), pytest.raises(Interruption):
        gradhooks.MultiPose(specimen.model, broken, accumulator=accumulator)(specimen.make_poses(3))
    combined, _ = gradhooks.MultiPose(specimen.model, "mean", accumulator=accumulator)(specimen.make_poses(3))
    combined.register_hook(_interrupt)
    with untouched(specimen.model), pytest.raises(Interruption):
        combined.sum().backward()


def _interrupt(_: Tensor) -> None:
    raise Interruption("stop")


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", FRAGILE)
def test_after_a_result_that_is_dropped(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    fresh_gradients(specimen)
    leaves = leaves_of(specimen, None)
    before, gradients = structure(specimen.model), gradients_of(leaves)
    scorer = gradhooks.MultiPose(specimen.model, "boltzmann", accumulator=accumulator, call=specimen.call)
    combined, predictions = scorer(specimen.make_poses(5))
    of_the_group = [weakref.ref(combined), weakref.ref(predictions)]
    del combined, predictions
    gc.collect()
    assert [reference() for reference in of_the_group] == [None, None]
    assert structure(specimen.model) == before
    assert differing(gradients, gradients_of(leaves)) == []


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", FRAGILE)
def test_the_outer_backward_moves_neither_buffers_nor_random_state(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    scorer = gradhooks.MultiPose(specimen.model, "boltzmann", accumulator=accumulator, call=specimen.call)
    prediction = scorer(specimen.make_poses(5))
    torch.randn(3)
    for buffer in specimen.model.buffers():
        buffer.data.add_(1)
    before = numbers(specimen.model)
    loss = of_both(prediction)
    loss.backward()
    changed = differing(before, numbers(specimen.model))
    assert [what for what in changed if not what.endswith(".grad")] == []


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_batch_norm_counts_each_pose_once(accumulator: str, double: Place) -> None:
    specimen = build("batch_norm_in_training", double)
    train_by_group(specimen, COMBINATIONS["boltzmann"], of_both, 5, accumulator)
    assert specimen.model.get_buffer("body.1.num_batches_tracked").item() == 5


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_existing_gradients_are_added_to_in_place(accumulator: str, double: Place) -> None:
    specimen = build("plain_mlp", double)
    for parameter in specimen.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    held = [parameter.grad for parameter in specimen.model.parameters()]
    found = train_by_group(specimen, COMBINATIONS["min"], of_both, 5, accumulator)
    expected = train_by_full_graph(build("plain_mlp", double), COMBINATIONS["min"], of_both, 5)
    for name, gradient in expected.gradients.items():
        assert gradient is not None
        torch.testing.assert_close(found.gradients[name], gradient + 7, rtol=1e-12, atol=1e-12)
    assert [id(parameter.grad) for parameter in specimen.model.parameters()] == [id(gradient) for gradient in held]


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "batch_norm_in_training", "dropout", "vector_output", "lstm"])
def test_prediction_without_gradients(name: str, accumulator: str, grad_mode: Any, double: Place) -> None:
    specimen, plain = build(name, double), build(name, double)
    scorer = gradhooks.MultiPose(specimen.model, "mean", accumulator=accumulator, call=specimen.call)
    with grad_mode(), same_structure(specimen.model):
        torch.manual_seed(3)
        combined, predictions = scorer(specimen.make_poses(4))
        after = torch.get_rng_state()
        torch.manual_seed(3)
        expected = torch.stack([plain.call(plain.model, pose) for pose in plain.make_poses(4)])
    torch.testing.assert_close(predictions, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined, expected.mean(0), rtol=1e-12, atol=1e-12)
    assert not combined.requires_grad
    assert not predictions.requires_grad
    assert all(parameter.grad is None for parameter in specimen.model.parameters())
    assert torch.equal(after, torch.get_rng_state())
    for name_of_buffer, buffer in plain.model.named_buffers():
        assert torch.equal(specimen.model.get_buffer(name_of_buffer), buffer)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "batch_norm_in_training", "lstm", "tied_weights"])
def test_copies_and_pickles_of_a_trained_model_are_plain(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    keys = list(specimen.model.state_dict())
    train_by_group(specimen, COMBINATIONS["min"], of_both, 4, accumulator)
    for twin in (copy.deepcopy(specimen.model), pickle.loads(pickle.dumps(specimen.model))):  # noqa: S301  # our own
        assert list(twin.state_dict()) == keys
        assert all(hooks_of(parameter) == (0, 0) for parameter in twin.parameters())
        again = train_by_group(Specimen(twin, specimen.make_poses), COMBINATIONS["min"], of_both, 4, accumulator)
        expected = train_by_full_graph(
            Specimen(copy.deepcopy(specimen.model), specimen.make_poses), COMBINATIONS["min"], of_both, 4
        )
        assert_same_gradients(again.gradients, expected.gradients)


class LooksAtItself(nn.Module):
    """Saves and copies itself in the middle of a group, as a callback might."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.saved: list[Any] = []

    def forward(self, pose: Tensor) -> Tensor:
        self.saved.append(({name: value.clone() for name, value in self.state_dict().items()}, copy.deepcopy(self.net)))
        return self.net(pose)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_model_saved_in_the_middle_of_a_group(accumulator: str, double: Place) -> None:
    model = LooksAtItself().to(double.device, double.dtype)
    combined, _ = gradhooks.MultiPose(model, "mean", accumulator=accumulator)(list(double.randn(4, 4)))
    combined.sum().backward()
    for saved, twin in model.saved:
        assert list(saved) == ["net.weight", "net.bias"]
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
        assert torch.equal(twin.weight, model.net.weight)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "shared_encoder_output", "lstm"])
def test_poses_are_untouched(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    poses = specimen.make_poses(4)
    tensors = [tensor for pose in poses for tensor in (pose if isinstance(pose, tuple) else (pose,))]
    before = [(tensor.detach().clone(), tensor._version, tensor.requires_grad, hooks_of(tensor)) for tensor in tensors]
    prediction = gradhooks.MultiPose(specimen.model, "min", accumulator=accumulator, call=specimen.call)(poses)
    of_both(prediction).backward()
    for tensor, (value, version, requires_grad, hooks) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor._version, tensor.requires_grad, hooks_of(tensor)) == (version, requires_grad, hooks)
        assert not tensor.is_leaf or tensor.grad is None


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_modes_of_autograd_are_untouched(accumulator: str, double: Place) -> None:
    specimen = build("plain_mlp", double)
    with torch.autograd.set_detect_anomaly(False), torch.autocast("cpu", enabled=False):
        before = _modes()
        train_by_group(specimen, COMBINATIONS["min"], of_both, 4, accumulator)
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
def test_anomaly_detection(accumulator: str, double: Place) -> None:
    with torch.autograd.set_detect_anomaly(True):
        found = train_by_group(build("plain_mlp", double), COMBINATIONS["min"], of_both, 4, accumulator)
    expected = train_by_full_graph(build("plain_mlp", double), COMBINATIONS["min"], of_both, 4)
    assert_same_gradients(found.gradients, expected.gradients)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "lstm", "transformer_encoder", "vector_output"])
def test_autocast_holds_for_the_second_run_too(name: str, accumulator: str, single: Place) -> None:
    def within(train: Callable[[], Trained]) -> Trained:
        with torch.autocast(single.device.type, dtype=torch.bfloat16):
            return train()

    found = within(lambda: _backward_outside(build(name, single), accumulator, single))
    expected = within(lambda: _backward_outside(build(name, single), None, single))
    # The full graph adds the poses' gradients up in bfloat16, behind one cast of each weight.
    assert_same_gradients(found.gradients, expected.gradients, tolerance=0.02)


def _backward_outside(specimen: Specimen, accumulator: str | None, place: Place) -> Trained:
    def loss(prediction: gradhooks.MultiPosePrediction) -> Tensor:
        torch.set_autocast_enabled(place.device.type, False)
        return of_combined(prediction)

    if accumulator is None:
        return train_by_full_graph(specimen, COMBINATIONS["boltzmann"], loss, 4)
    return train_by_group(specimen, COMBINATIONS["boltzmann"], loss, 4, accumulator)


class DerivativesLater(nn.Module):
    """Differentiates by a leaf of its own, but not for the first poses, and keeps running statistics."""

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
def test_a_leaf_that_comes_late_leaves_statistics_as_they_were(accumulator: str, double: Place) -> None:
    model = DerivativesLater().to(double.device, double.dtype)
    plain, poses = copy.deepcopy(model), [(double.randn(5, 4), place > 1) for place in range(4)]
    torch.stack([plain(*pose) for pose in poses]).mean().backward()
    gradhooks.MultiPose(model, "mean", accumulator=accumulator)(poses).combined.sum().backward()
    wanted, found = dict(plain.named_parameters()), dict(model.named_parameters())
    assert_same_gradients(gradients_of(found), gradients_of(wanted))
    assert all(torch.equal(buffer, dict(plain.named_buffers())[name]) for name, buffer in model.named_buffers())
    assert model.norm.num_batches_tracked == len(poses)

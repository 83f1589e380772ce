"""After an exception, and between forward and backward, the model is as it was before the call."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chosen_device import needs
from model_state import changed_names, module_structure, tensor_values, unchanged
from model_zoo import ModelCase, TensorFactory, build
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    Gradients,
    assert_same_gradients,
    gradients_of,
    loss_on_both,
    train_full_graph,
    train_multi_pose,
    trained_leaves,
)

import gradhooks

# Models with buffers, random numbers, cached weights, tied parameters, second derivatives, or differentiable inputs.
STATEFUL_MODELS = [
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


class Interruption(Exception):  # noqa: N818  # the tests raise it on purpose
    pass


def fail_at(case: ModelCase, failing_call: int, fault: BaseException) -> Callable[[nn.Module, Any], Tensor]:
    """Return a `call` that raises in its call number `failing_call`, after the model has run."""
    calls = 0

    def call(model: nn.Module, pose: Any) -> Tensor:
        nonlocal calls
        prediction = case.call(model, pose)
        calls += 1
        if calls == failing_call + 1:
            raise fault
        return prediction

    return call


def set_some_gradients(case: ModelCase) -> None:
    """Give every other leaf a gradient."""
    for index, leaf in enumerate(trained_leaves(case, None).values()):
        leaf.grad = torch.ones_like(leaf) if index % 2 else None


def clear_gradients(case: ModelCase) -> None:
    for leaf in trained_leaves(case, None).values():
        leaf.grad = None


@functools.cache
def full_graph_gradients(name: str, factory: TensorFactory) -> Gradients:
    return train_full_graph(build(name, factory), COMBINATIONS["boltzmann"], loss_on_both, 5).gradients


@pytest.mark.parametrize("accumulator", CONCRETE_ACCUMULATORS)
@pytest.mark.parametrize("name", STATEFUL_MODELS)
def test_an_exception_at_any_pose_changes_nothing(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    set_some_gradients(case)
    for fault in (Interruption("stop"), KeyboardInterrupt()):
        for failing_pose in (0, 1, 4):
            scorer = gradhooks.MultiPose(
                case.model, "boltzmann", accumulator=accumulator, call=fail_at(case, failing_pose, fault)
            )
            poses = case.make_poses(5)
            with unchanged(case.model), pytest.raises(type(fault)):
                scorer(poses)
    # The model that failed six times trains as a new one.
    clear_gradients(case)
    result = train_multi_pose(case, COMBINATIONS["boltzmann"], loss_on_both, 5, accumulator)
    assert_same_gradients(result.gradients, full_graph_gradients(name, double))


@pytest.mark.parametrize("accumulator", ["recompute", "stream"])
@pytest.mark.parametrize("name", STATEFUL_MODELS)
def test_an_exception_in_the_outer_backward_changes_nothing(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    set_some_gradients(case)
    call = case.call
    scorer = gradhooks.MultiPose(
        case.model,
        "mean",
        accumulator=accumulator,
        call=lambda *arguments: call(*arguments),  # noqa: PLW0108  # `call` changes
    )
    for failing_call in (0, 2):
        call = case.call
        combined, predictions = scorer(case.make_poses(5))
        call = fail_at(case, failing_call, Interruption("stop"))
        # The loss on the poses makes stream recompute, too.
        with unchanged(case.model), pytest.raises(Interruption):
            (combined.sum() + predictions.square().sum()).backward()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_exception_in_the_combination_or_the_loss_changes_nothing(accumulator: str, double: TensorFactory) -> None:
    needs("errors in hooks of a backward")
    case = build("plain_mlp", double)

    def interrupt(_: Tensor) -> Tensor:
        raise Interruption("stop")

    with unchanged(case.model), pytest.raises(Interruption):
        gradhooks.MultiPose(case.model, interrupt, accumulator=accumulator)(case.make_poses(3))
    combined, _ = gradhooks.MultiPose(case.model, "mean", accumulator=accumulator)(case.make_poses(3))
    combined.register_hook(interrupt)
    with unchanged(case.model), pytest.raises(Interruption):
        combined.sum().backward()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", STATEFUL_MODELS)
def test_a_prediction_without_backward_leaves_nothing(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    set_some_gradients(case)
    leaves = trained_leaves(case, None)
    structure_before, gradients_before = module_structure(case.model), gradients_of(leaves)
    scorer = gradhooks.MultiPose(case.model, "boltzmann", accumulator=accumulator, call=case.call)
    combined, predictions = scorer(case.make_poses(5))
    references = [weakref.ref(combined), weakref.ref(predictions)]
    del combined, predictions
    assert [reference() for reference in references] == [None, None]
    assert module_structure(case.model) == structure_before
    assert changed_names(gradients_before, gradients_of(leaves)) == []


@pytest.mark.parametrize("accumulator", CONCRETE_ACCUMULATORS)
@pytest.mark.parametrize("name", STATEFUL_MODELS)
def test_the_outer_backward_changes_neither_buffers_nor_random_state(
    name: str, accumulator: str, double: TensorFactory
) -> None:
    case = build(name, double)
    scorer = gradhooks.MultiPose(case.model, "boltzmann", accumulator=accumulator, call=case.call)
    prediction = scorer(case.make_poses(5))
    torch.randn(3)
    for buffer in case.model.buffers():
        buffer.data.add_(1)
    before = tensor_values(case.model)
    loss_on_both(prediction).backward()
    changed = changed_names(before, tensor_values(case.model))
    assert [name for name in changed if not name.endswith(".grad")] == []


class TurnsAutocastOn(nn.Linear):
    """Fails while autocast is on, without a block that turns it off."""

    def forward(self, pose: Tensor) -> Tensor:
        torch.set_autocast_enabled(pose.device.type, True)
        torch.set_autocast_dtype(pose.device.type, torch.bfloat16)
        raise Interruption


@pytest.mark.parametrize("memory", [0, "1GiB"])
def test_autocast_that_a_failing_forward_has_turned_on_is_turned_off(memory: int | str, single: TensorFactory) -> None:
    kind = single.device.type
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    scorer = gradhooks.MultiPose(TurnsAutocastOn(3, 1).to(single.device), memory=memory)
    with pytest.raises(Interruption):
        scorer(single.randn(2, 3))
    assert (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) == before

"""After an exception, and between forward and backward, the model is as it was before the call."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_state import differing, numbers, structure, untouched
from model_zoo import Place, Specimen, build
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    Gradients,
    assert_same_gradients,
    gradients_of,
    leaves_of,
    of_both,
    train_by_full_graph,
    train_by_group,
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
# On a first group "auto" delegates to "recompute": test_auto.py.
FIRST_GROUP_ACCUMULATORS = ["store", "stream", "recompute"]


class Interruption(Exception):  # noqa: N818  # the tests raise it on purpose
    pass


def fail_at(specimen: Specimen, failing_call: int, fault: BaseException) -> Callable[[nn.Module, Any], Tensor]:
    """Return a `call` that raises in its call number `failing_call`, after the model has run."""
    calls = 0

    def call(model: nn.Module, pose: Any) -> Tensor:
        nonlocal calls
        prediction = specimen.call(model, pose)
        calls += 1
        if calls == failing_call + 1:
            raise fault
        return prediction

    return call


def set_some_gradients(specimen: Specimen) -> None:
    """Give every other leaf a gradient."""
    for index, leaf in enumerate(leaves_of(specimen, None).values()):
        leaf.grad = torch.ones_like(leaf) if index % 2 else None


def clear_gradients(specimen: Specimen) -> None:
    for leaf in leaves_of(specimen, None).values():
        leaf.grad = None


@functools.cache
def full_graph_gradients(name: str, place: Place) -> Gradients:
    return train_by_full_graph(build(name, place), COMBINATIONS["boltzmann"], of_both, 5).gradients


@pytest.mark.parametrize("accumulator", FIRST_GROUP_ACCUMULATORS)
@pytest.mark.parametrize("name", STATEFUL_MODELS)
def test_an_exception_at_any_pose_changes_nothing(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    set_some_gradients(specimen)
    for fault in (Interruption("stop"), KeyboardInterrupt()):
        for failing_pose in (0, 1, 4):
            scorer = gradhooks.MultiPose(
                specimen.model, "boltzmann", accumulator=accumulator, call=fail_at(specimen, failing_pose, fault)
            )
            poses = specimen.make_poses(5)
            with untouched(specimen.model), pytest.raises(type(fault)):
                scorer(poses)
    # The model that failed six times trains as a new one.
    clear_gradients(specimen)
    result = train_by_group(specimen, COMBINATIONS["boltzmann"], of_both, 5, accumulator)
    assert_same_gradients(result.gradients, full_graph_gradients(name, double))


@pytest.mark.parametrize("accumulator", ["recompute", "stream"])
@pytest.mark.parametrize("name", STATEFUL_MODELS)
def test_an_exception_in_the_outer_backward_changes_nothing(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    set_some_gradients(specimen)
    call = specimen.call
    scorer = gradhooks.MultiPose(
        specimen.model,
        "mean",
        accumulator=accumulator,
        call=lambda *arguments: call(*arguments),  # noqa: PLW0108  # `call` changes
    )
    for failing_call in (0, 2):
        call = specimen.call
        combined, predictions = scorer(specimen.make_poses(5))
        call = fail_at(specimen, failing_call, Interruption("stop"))
        # The loss on the poses makes stream recompute, too.
        with untouched(specimen.model), pytest.raises(Interruption):
            (combined.sum() + predictions.square().sum()).backward()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_exception_in_the_combination_or_the_loss_changes_nothing(accumulator: str, double: Place) -> None:
    specimen = build("plain_mlp", double)

    def interrupt(_: Tensor) -> Tensor:
        raise Interruption("stop")

    with untouched(specimen.model), pytest.raises(Interruption):
        gradhooks.MultiPose(specimen.model, interrupt, accumulator=accumulator)(specimen.make_poses(3))
    combined, _ = gradhooks.MultiPose(specimen.model, "mean", accumulator=accumulator)(specimen.make_poses(3))
    combined.register_hook(interrupt)
    with untouched(specimen.model), pytest.raises(Interruption):
        combined.sum().backward()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", STATEFUL_MODELS)
def test_a_prediction_without_backward_leaves_nothing(name: str, accumulator: str, double: Place) -> None:
    specimen = build(name, double)
    set_some_gradients(specimen)
    leaves = leaves_of(specimen, None)
    structure_before, gradients_before = structure(specimen.model), gradients_of(leaves)
    scorer = gradhooks.MultiPose(specimen.model, "boltzmann", accumulator=accumulator, call=specimen.call)
    combined, predictions = scorer(specimen.make_poses(5))
    references = [weakref.ref(combined), weakref.ref(predictions)]
    del combined, predictions
    assert [reference() for reference in references] == [None, None]
    assert structure(specimen.model) == structure_before
    assert differing(gradients_before, gradients_of(leaves)) == []


@pytest.mark.parametrize("accumulator", FIRST_GROUP_ACCUMULATORS)
@pytest.mark.parametrize("name", STATEFUL_MODELS)
def test_the_outer_backward_changes_neither_buffers_nor_random_state(
    name: str, accumulator: str, double: Place
) -> None:
    specimen = build(name, double)
    scorer = gradhooks.MultiPose(specimen.model, "boltzmann", accumulator=accumulator, call=specimen.call)
    prediction = scorer(specimen.make_poses(5))
    torch.randn(3)
    for buffer in specimen.model.buffers():
        buffer.data.add_(1)
    before = numbers(specimen.model)
    of_both(prediction).backward()
    changed = differing(before, numbers(specimen.model))
    assert [name for name in changed if not name.endswith(".grad")] == []

"""Group after group, nothing is left over."""

import copy
import gc
import io
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from model_state import HOOK_ATTRIBUTES, hook_counts, structure_unchanged
from model_zoo import ModelCase, TensorFactory, build
from torch import Tensor
from training_reference import ACCUMULATORS, COMBINATIONS, loss_on_both, loss_on_combined

import gradhooks

GROUPS = 200
# Plain; random; with buffers; with leaves outside; of several gradients for a leaf; with a graph inside the forward.
MODELS = [
    "plain_mlp",
    "dropout",
    "batch_norm_in_training",
    "shared_encoder_output",
    "tied_in_reentrant_checkpoints",
    "forces_by_a_copy_of_the_pose",
]


def tensors_alive() -> int:
    return sum(type(thing) in {Tensor, torch.nn.Parameter} for thing in gc.get_objects())


def objects_alive() -> Counter[str]:
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects())


def hooks_on(case: ModelCase) -> list[Any]:
    modules = [[len(getattr(module, name, ())) for name in HOOK_ATTRIBUTES] for module in case.model.modules()]
    leaves = [hook_counts(leaf) for leaf in [*case.model.parameters(), *case.outside.values()]]
    return [modules, leaves]


@pytest.fixture(autouse=True, scope="module")
def _nothing_but_these_tests() -> Iterator[None]:
    """Takes what is there already out of the collector's sight, which also makes looking fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "shared_encoder_output"])
def test_two_hundred_groups(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    scorer = gradhooks.MultiPose(case.model, "boltzmann", accumulator=accumulator, call=case.call)

    def train(groups: int) -> None:
        for group in range(groups):
            prediction = scorer(case.make_poses(2))
            if group % 4 != 0:  # some are dropped
                (loss_on_both if group % 4 == 1 else loss_on_combined)(prediction).backward()

    train(20)
    counts, hooks = [objects_alive()], hooks_on(case)
    for _ in range(2):  # Python makes a few objects once, and keeps them
        train(GROUPS // 2)
        counts.append(objects_alive())
    grown = [after - before for before, after in pairwise(counts)]
    assert min(sum(each.values()) for each in grown) < GROUPS // 10, grown
    assert hooks_on(case) == hooks


@pytest.mark.parametrize("backward", [False, True], ids=["dropped", "trained"])
@pytest.mark.parametrize("combination", ["boltzmann learnable", "attention"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", MODELS)
def test_a_result_dies_with_its_last_reference(
    name: str, accumulator: str, combination: str, backward: bool, double: TensorFactory
) -> None:
    case = build(name, double)
    made = COMBINATIONS[combination]().to(double.device)
    scorer = gradhooks.MultiPose(case.model, made, accumulator=accumulator, call=case.call)
    loss_on_both(scorer(case.make_poses(4))).backward()  # gradients, and whatever is made once
    with without_collector():
        before = tensors_alive()
        prediction = scorer(case.make_poses(4))
        if backward:
            loss_on_both(prediction).backward()
        assert tensors_alive() > before
        del prediction
        assert tensors_alive() == before


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_what_a_group_keeps_goes_with_its_backward(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    scorer = gradhooks.MultiPose(case.model, "boltzmann", accumulator=accumulator)

    def bytes_kept() -> int:
        # Not the random state (uint8) at the beginning of the group: a few kilobytes.
        kept = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.dtype != torch.uint8]
        return sum(tensor.nbytes for tensor in kept)

    poses = case.make_poses(4)
    loss_on_combined(scorer(poses)).backward()
    with without_collector():
        before = bytes_kept()
        combined, predictions = scorer(poses)
        loss = combined.square().sum()
        loss.backward()
        own = combined.nbytes + predictions.nbytes + loss.nbytes
        # The results are still there, with their node of the graph and a copy of the predictions for it.
        assert bytes_kept() - before <= own + 2 * predictions.nbytes


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_group_that_fails_dies_at_once(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)

    def call(model: Any, pose: Tensor) -> Tensor:
        if pose[0] > 1e6:
            raise ArithmeticError("too high")
        return case.call(model, pose)

    scorer = gradhooks.MultiPose(case.model, "boltzmann", accumulator=accumulator, call=call)
    poses = case.make_poses(4)
    loss_on_both(scorer(poses)).backward()
    poses[3][0] = 1e9

    def fail() -> None:
        with pytest.raises(ArithmeticError, match="too high"):
            scorer(poses)

    fail()
    objects_alive()
    before = tensors_alive()
    for _ in range(5):
        fail()
    gc.collect()  # pytest's report of the fault is a cycle
    assert tensors_alive() == before
    assert hooks_on(case) == hooks_on(build("plain_mlp", double))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_after_groups(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    scorer = gradhooks.MultiPose(case.model, "boltzmann", accumulator=accumulator, call=case.call)
    with structure_unchanged(case.model):
        for count in (2, 4, 3):
            loss_on_both(scorer(case.make_poses(count))).backward()
        pending = scorer(case.make_poses(4))
        copies = [copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))]  # noqa: S301  # our own
        loss_on_both(pending).backward()
    whole = io.BytesIO()
    torch.save(case.model, whole)
    whole.seek(0)
    copies.append(torch.load(whole, weights_only=False))
    for twin in copies:
        assert list(twin.state_dict()) == list(case.model.state_dict())
        assert hooks_on(ModelCase(twin, case.make_poses))[0] == hooks_on(case)[0]
        assert all(hook_counts(leaf) == (0, 0) for leaf in twin.parameters())
        assert all(type(leaf) is torch.nn.Parameter for leaf in twin.parameters())
        assert not any(vars(leaf) for leaf in twin.parameters())


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_scorer_dies_with_its_last_reference(accumulator: str, double: TensorFactory) -> None:
    with without_collector():
        before = tensors_alive()
        case = build("plain_mlp", double)
        scorer = gradhooks.MultiPose(case.model, "boltzmann", accumulator=accumulator)
        loss_on_both(scorer(case.make_poses(3))).backward()
        del scorer, case
        assert tensors_alive() == before

"""No tensor, object or hook is left after a group."""

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from model_state import HOOK_ATTRIBUTES, hook_counts, structure_unchanged
from model_zoo import ModelCase, TensorFactory, build
from small_model import random_poses, small_mlp
from torch import Tensor, nn
from training_reference import ACCUMULATORS_AND_PLAIN, COMBINATIONS, loss_on_both, loss_on_combined, options_of

import gradhooks

GROUPS = 200
# Plain; random numbers; buffers; leaves outside the model; several gradients for a leaf; a graph in the forward.
MODELS = [
    "plain_mlp",
    "dropout",
    "batch_norm_in_training",
    "shared_encoder_output",
    "tied_in_reentrant_checkpoints",
    "forces_by_a_copy_of_the_pose",
]


def tensors_alive() -> int:
    return sum(type(each) in {Tensor, nn.Parameter} for each in gc.get_objects())


def objects_alive() -> Counter[str]:
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects())


def hooks_on(case: ModelCase) -> list[Any]:
    modules = [[len(getattr(module, name, ())) for name in HOOK_ATTRIBUTES] for module in case.model.modules()]
    leaves = [hook_counts(leaf) for leaf in [*case.model.parameters(), *case.outside.values()]]
    return [modules, leaves]


@pytest.fixture(autouse=True, scope="module")
def _exclude_older_objects() -> None:
    """Exclude the objects of other tests from `gc.get_objects()`, which also makes it fast."""
    gc.collect()
    gc.freeze()


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
@pytest.mark.parametrize("name", ["plain_mlp", "shared_encoder_output"])
def test_two_hundred_groups(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    scorer = gradhooks.MultiPose(case.model, "boltzmann", call=case.call, **options_of(accumulator))

    def train(groups: int) -> None:
        for group in range(groups):
            prediction = scorer(case.make_poses(2))
            if group % 4 != 0:  # some are dropped
                (loss_on_both if group % 4 == 1 else loss_on_combined)(prediction).backward()

    train(20)
    counts, hooks = [objects_alive()], hooks_on(case)
    for _ in range(2):  # Python creates some objects once and keeps them
        train(GROUPS // 2)
        counts.append(objects_alive())
    grown = [after - before for before, after in pairwise(counts)]
    assert min(sum(each.values()) for each in grown) < GROUPS // 10, grown
    assert hooks_on(case) == hooks


@pytest.mark.parametrize("backward", [False, True], ids=["dropped", "trained"])
@pytest.mark.parametrize("combination", ["boltzmann learnable", "attention"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_is_freed_with_its_last_reference(
    name: str, accumulator: str, combination: str, backward: bool, double: TensorFactory
) -> None:
    case = build(name, double)
    pooling = COMBINATIONS[combination]().to(double.device)
    scorer = gradhooks.MultiPose(case.model, pooling, call=case.call, **options_of(accumulator))

    def predict() -> gradhooks.MultiPosePrediction:
        prediction = scorer(case.make_poses(4))
        if backward:
            loss_on_both(prediction).backward()
        return prediction

    loss_on_both(scorer(case.make_poses(4))).backward()  # creates gradients, and what is created once
    predict()  # leaves the last snapshot of the model state, and coefficients that the next batch evaluates
    with without_collector():
        before = tensors_alive()
        prediction = predict()
        assert tensors_alive() > before
        del prediction
        assert tensors_alive() <= before  # auto keeps what the newest batch has shown until the next one


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_the_backward_frees_what_the_group_kept(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    scorer = gradhooks.MultiPose(case.model, "boltzmann", **options_of(accumulator))

    def bytes_kept() -> int:
        # Except the random state (uint8) at the beginning of the group: a few kilobytes.
        kept = [each for each in gc.get_objects() if type(each) is Tensor and each.dtype != torch.uint8]
        return sum(tensor.nbytes for tensor in kept)

    poses = case.make_poses(4)
    for _ in range(2):  # gradients of a device become Python objects where they are first added to
        loss_on_combined(scorer(poses)).backward()
    with without_collector():
        before = bytes_kept()
        combined, predictions = scorer(poses)
        loss = combined.square().sum()
        loss.backward()
        own = combined.nbytes + predictions.nbytes + loss.nbytes
        # The predictions still exist, with their node in the graph and the copy that it saved.
        assert bytes_kept() - before <= own + 2 * predictions.nbytes


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_a_group_that_fails_is_freed_at_once(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)

    def call(model: Any, pose: Tensor) -> Tensor:
        if pose[0] > 1e6:
            raise ArithmeticError("too high")
        return case.call(model, pose)

    scorer = gradhooks.MultiPose(case.model, "boltzmann", call=call, **options_of(accumulator))
    poses = case.make_poses(4)
    loss_on_both(scorer(poses)).backward()
    poses[3][0] = 1e9

    def fail() -> None:
        with pytest.raises(ArithmeticError, match="too high"):
            scorer(poses)

    fail()  # what was known about the model is learned again
    fail()
    objects_alive()
    before = tensors_alive()
    for _ in range(5):
        fail()
    gc.collect()  # pytest's record of the exception is a cycle
    assert tensors_alive() <= before
    assert hooks_on(case) == hooks_on(build("plain_mlp", double))


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_after_groups(name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    scorer = gradhooks.MultiPose(case.model, "boltzmann", call=case.call, **options_of(accumulator))
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
    for copied in copies:
        assert list(copied.state_dict()) == list(case.model.state_dict())
        assert hooks_on(ModelCase(copied, case.make_poses))[0] == hooks_on(case)[0]
        assert all(hook_counts(leaf) == (0, 0) for leaf in copied.parameters())
        assert all(type(leaf) is nn.Parameter for leaf in copied.parameters())
        assert not any(vars(leaf) for leaf in copied.parameters())


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_a_scorer_is_freed_with_its_last_reference(accumulator: str, double: TensorFactory) -> None:
    with without_collector():
        before = tensors_alive()
        case = build("plain_mlp", double)
        scorer = gradhooks.MultiPose(case.model, "boltzmann", **options_of(accumulator))
        loss_on_both(scorer(case.make_poses(3))).backward()
        del scorer, case
        assert tensors_alive() == before


def _tensors_and_hooks_alive() -> tuple[int, int]:
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return len(tensors), sum(len(tensor._backward_hooks or ()) for tensor in tensors)


@pytest.mark.parametrize(
    "accumulator",
    ["auto", "plain", *(pytest.param(name, marks=pytest.mark.long) for name in ("store", "stream", "recompute"))],
)
def test_five_hundred_groups_some_of_them_failing(accumulator: str) -> None:
    model = small_mlp()

    def sometimes(model: nn.Module, pose: Tensor) -> Tensor:
        if pose[0] > 1.5:
            raise RuntimeError("injected")
        return model(pose)

    scorer = gradhooks.MultiPose(model, "boltzmann", call=sometimes, **options_of(accumulator))
    dropped: list[Any] = []

    def run(count: int) -> None:
        for number in range(count):
            try:
                prediction = scorer(random_poses(3))
            except RuntimeError:
                continue
            if number % 3:
                prediction.combined.sum().backward()
            dropped.append(weakref.ref(prediction.combined))

    run(20)
    _tensors_and_hooks_alive()  # frees what earlier tests left, which may take the collector several rounds
    before = _tensors_and_hooks_alive()
    gc.disable()  # what is freed while the collector is off is part of no reference cycle
    try:
        run(500)
        assert not any(reference() is not None for reference in dropped)
    finally:
        gc.enable()
    after = _tensors_and_hooks_alive()
    assert (after[0] <= before[0], after[1]) == (True, before[1])

"""Whatever `memory` allows: gradients, buffers and random state are those of plain PyTorch, and memory is a limit."""

import copy
import gc
from itertools import pairwise
from typing import Any

import pytest
import torch
from chosen_device import DEVICE
from memory_budgets import COUNT, GROUPS, SHARES, graph_bytes, rows
from model_zoo import TensorFactory, build
from seeding import manual_seed
from small_model import small_mlp
from torch import Tensor, nn
from training_reference import (
    COMBINATIONS,
    LOSSES,
    Gradients,
    assert_bit_equal,
    assert_same_gradients,
    assert_same_training,
    case_label,
    gradients_of,
    loss_on_both,
    train_full_graph,
    train_multi_pose,
    trained_leaves,
)

import gradhooks
from gradhooks.testing import full_graph


def loss_on_groups(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    weights = torch.arange(1.0, 1 + len(prediction.combined), dtype=torch.float64, device=DEVICE).unsqueeze(1)
    return (weights * prediction.combined).square().sum()


GROUP_LOSSES = {
    "combined": loss_on_groups,
    "poses": LOSSES["poses"],
    "both": lambda prediction: loss_on_groups(prediction) + LOSSES["poses"](prediction),
    "ranking": lambda prediction: (prediction.per_pose - prediction.combined.mean().detach()).relu().square().sum(),
}

FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "stack": (lambda poses: poses, {}),
    "stack in chunks of 3": (lambda poses: poses, {"chunk_size": 3}),
    "list": (list, {}),
    "list with collate": (list, {"collate": torch.stack}),
}


def gradients_of_full_graph(model: nn.Module, combination: str, loss: Any, poses: Tensor) -> Gradients:
    reference = copy.deepcopy(model)
    loss(full_graph(reference, poses, COMBINATIONS[combination](), GROUPS)).backward()
    return gradients_of(dict(reference.named_parameters()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", GROUP_LOSSES)
@pytest.mark.parametrize(
    "combination",
    [
        "mean",
        "boltzmann",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("min of scale 1", "attention", "function")),
    ],
)
def test_every_budget(combination: str, loss: str, form: str) -> None:
    model, poses = small_mlp(), rows()
    make_poses, options = FORMS[form]
    expected = gradients_of_full_graph(model, combination, GROUP_LOSSES[loss], poses)
    plain = []
    for share in SHARES:
        memory = int(share * graph_bytes())
        scorer = gradhooks.MultiPose(model, COMBINATIONS[combination](), memory=memory, **options)
        for _ in range(2):  # the first batch also measures
            model.zero_grad()
            GROUP_LOSSES[loss](scorer(make_poses(poses), groups=torch.tensor(GROUPS))).backward()
            with case_label(share):
                assert_same_gradients(gradients_of(dict(model.named_parameters())), expected, tolerance=1e-10)
        report = scorer.report
        assert (report.accumulator == "none") == (report.plain == COUNT)
        plain.append(report.plain)
    assert all(more >= less - 1 for less, more in pairwise(plain))  # one pose gives way to a larger chunk
    assert (plain[0], plain[-1]) == (0, COUNT)
    assert len(set(plain)) > 3


ZOO_MODELS = [
    "plain_mlp",
    "tied_weights",
    "used_by_some_poses",
    "dropout",
    "batch_norm_in_training",
    "vector_output",
    "shared_encoder_output",
    "forces_by_a_copy_of_the_pose",
    "tied_in_reentrant_checkpoints",
]


@pytest.mark.parametrize("combination", ["min", "boltzmann learnable"])
@pytest.mark.parametrize("name", ZOO_MODELS)
def test_models_of_the_zoo(name: str, combination: str, double: TensorFactory) -> None:
    """Buffers and random state too, since each pose runs in a chunk of its own."""
    expected = train_full_graph(build(name, double), COMBINATIONS[combination], loss_on_both, 7)
    accumulators = set()
    for memory in (0, 1000, 2000, 4000, 8000, 16000, "1GiB"):
        with case_label(memory):
            result = train_multi_pose(
                build(name, double), COMBINATIONS[combination], loss_on_both, 7, "auto", memory=memory
            )
            assert_same_training(result, expected, tolerance=1e-10)
        accumulators.add(result.accumulator)
    assert "none" in accumulators
    assert accumulators & {"stream", "recompute"}


def train_plain_and_intercepted(loss: Any = loss_on_both, **options: Any) -> tuple[nn.Module, Any, Any]:
    """Train in one batch of which some poses run plainly and some are intercepted; return the model with hooks."""
    model = small_mlp()
    hooks: dict[str, list[Any]] = {"gradient": [], "accumulated": []}
    for leaf in model.parameters():
        leaf.register_hook(lambda gradient: hooks["gradient"].append(gradient.clone()))
        leaf.register_post_accumulate_grad_hook(lambda leaf: hooks["accumulated"].append(leaf.grad.clone()))
    scorer = gradhooks.MultiPose(model, "boltzmann", memory=int(0.7 * graph_bytes()), **options)
    loss(scorer(rows())).backward()
    return model, scorer, hooks


def test_hooks_see_one_total_gradient() -> None:
    model, scorer, hooks = train_plain_and_intercepted()
    assert 0 < scorer.report.plain < COUNT
    reference = copy.deepcopy(model)
    reference.zero_grad()
    loss_on_both(full_graph(reference, rows(), COMBINATIONS["boltzmann"]())).backward()
    totals = gradients_of(dict(reference.named_parameters()))
    for calls in hooks.values():
        assert len(calls) == len(totals)
        for total in totals.values():
            assert total is not None
            assert any(total.shape == call.shape and torch.allclose(total, call, rtol=1e-10) for call in calls)


def test_a_batch_that_fits_is_bit_equal_to_one_plain_graph(single: TensorFactory) -> None:
    for name in ("plain_mlp", "tied_weights", "vector_output"):
        case, plain = build(name, single), build(name, single)
        poses = torch.stack(case.make_poses(8))
        scorer = gradhooks.MultiPose(case.model, "boltzmann")
        combination = COMBINATIONS["boltzmann"]()
        for first_batch in (True, False):
            case.model.zero_grad()
            plain.model.zero_grad()
            prediction = scorer(poses)
            chunks = [poses[:1], poses[1:]] if first_batch else [poses]  # the first pose is measured by itself
            predictions = torch.cat([plain.model(chunk) for chunk in chunks])
            combined = combination(predictions)
            assert torch.equal(prediction.combined, combined)
            loss_on_both(prediction).backward()
            loss_on_both(gradhooks.MultiPosePrediction(combined, predictions)).backward()
            assert scorer.report.plain == 8
            assert_bit_equal(gradients_of(trained_leaves(case, None)), gradients_of(trained_leaves(plain, None)))


def test_two_open_batches_count_each_others_memory() -> None:
    model, poses = small_mlp(), rows()
    scorer = gradhooks.MultiPose(model, "boltzmann", memory=int(1.5 * graph_bytes()))
    scorer(poses).combined.sum().backward()
    assert scorer.report.plain == COUNT
    first, first_report = scorer(poses), scorer.report
    second, second_report = scorer(poses), scorer.report
    assert first_report.plain == COUNT > second_report.plain
    (loss_on_both(first) + loss_on_both(second)).backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    full_graph(expected, poses, COMBINATIONS["boltzmann"]()).combined.sum().backward()
    for _ in range(2):
        loss_on_both(full_graph(expected, poses, COMBINATIONS["boltzmann"]())).backward()
    assert_same_gradients(*(gradients_of(dict(each.named_parameters())) for each in (model, expected)))
    scorer(poses)
    assert scorer.report.plain == COUNT  # the backward, or the end of a prediction, returns the memory
    scorer(poses)
    gc.collect()
    assert scorer.report.plain == COUNT


class Sequences(nn.Module):
    """Takes poses of any length, and keeps a square of its length."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.net(pose)
        return (hidden @ hidden.T).exp().mean().log().unsqueeze(0)


def test_larger_poses_that_come_later_are_measured() -> None:
    manual_seed(5)
    model = Sequences()
    poses = [0.1 * torch.randn(length, 4, dtype=torch.float64).to(DEVICE) for length in [2] * 6 + [40] * 4]
    reference = copy.deepcopy(model)
    loss_on_both(full_graph(reference, poses, COMBINATIONS["boltzmann"]())).backward()
    runs: list[int] = []

    def call(model: nn.Module, pose: Tensor) -> Tensor:
        runs.append(len(pose))
        prediction: Tensor = model(pose)
        return prediction

    scorer = gradhooks.MultiPose(model, "boltzmann", memory=30_000, call=call)
    prediction = scorer(poses)
    assert len(runs) > len(poses)  # the batch started again
    loss_on_both(prediction).backward()
    assert scorer.report.plain < len(poses)
    assert_same_gradients(*(gradients_of(dict(each.named_parameters())) for each in (model, reference)))


class Exploded(nn.Module):
    """Uses transforms of torch.func, which refuse hooks on saved tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, pose: Tensor) -> Tensor:
        slope = torch.func.grad(lambda value: self.net(value).sum())
        return self.net(pose) + slope(pose).square().sum(-1, keepdim=True)


def test_transforms_in_the_model() -> None:
    manual_seed(5)
    model = Exploded()
    reference = copy.deepcopy(model)
    loss_on_both(full_graph(reference, rows(), COMBINATIONS["boltzmann"]())).backward()
    expected = gradients_of(dict(reference.named_parameters()))
    for memory in (0, 20_000, "1GiB"):
        model.zero_grad()
        scorer = gradhooks.MultiPose(model, "boltzmann", memory=memory)
        loss_on_both(scorer(rows())).backward()
        with case_label(memory):
            assert_same_gradients(gradients_of(dict(model.named_parameters())), expected, tolerance=1e-10)
    assert scorer.report.plain == COUNT

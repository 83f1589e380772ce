"""Copies of a scorer train as the original does, and a model may change between groups."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_helpers import COPIES, assert_same_state, learnable_boltzmann
from model_zoo import TensorFactory, build, mlp
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_both,
)

import gradhooks
from gradhooks import MultiPose
from gradhooks.testing import full_graph


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "batch_norm_in_training", "tied_weights", "lstm"])
@pytest.mark.parametrize("method", COPIES)
def test_copies_of_a_scorer_train_bit_for_bit_alike(
    method: str, name: str, accumulator: str, double: TensorFactory
) -> None:
    case = build(name, double)
    scorer = MultiPose(case.model, learnable_boltzmann(0.7), accumulator=accumulator)
    loss_on_both(scorer(case.make_poses(4))).backward()
    copied = COPIES[method](scorer)
    assert copied.model is not scorer.model
    assert_same_state(copied.state_dict(), scorer.state_dict())
    for module in (scorer, copied):
        module.zero_grad()
        loss_on_both(module(case.make_poses(5))).backward()
    assert_same_gradients(
        gradients_of(dict(copied.named_parameters())), gradients_of(dict(scorer.named_parameters())), tolerance=0.0
    )


def test_a_prediction_without_graph_is_pickled(double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    with torch.no_grad():
        prediction = MultiPose(case.model, "min")(case.make_poses(3))
    copied = gradhooks.MultiPosePrediction(*pickle.loads(pickle.dumps(tuple(prediction))))  # noqa: S301  # our own
    assert torch.equal(copied.combined, prediction.combined)
    assert torch.equal(copied.per_pose, prediction.per_pose)


# -- a model that changes between groups ----------------------------------------------------------------------------


class LowRank(nn.Module):
    """A low-rank adapter around a frozen layer, as in LoRA."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.ones(2, layer.in_features).to(layer.weight) / 3)
        self.up = nn.Parameter(torch.ones(layer.out_features, 2).to(layer.weight) / 5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) + self.up @ (self.down @ hidden)


def _adapt(model: nn.Sequential) -> None:
    model.requires_grad_(False)
    model[0] = LowRank(model[0])


def _replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def _load(model: nn.Sequential) -> None:
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})


def _load_by_assignment(model: nn.Sequential) -> None:
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()}, assign=True)


def _set_data(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def _drop_bias(model: nn.Sequential) -> None:
    model[0].bias = None


CHANGES: dict[str, Callable[[Any], object]] = {
    "float32": lambda model: model.to(torch.float32),
    "float32 and back": lambda model: model.float().double(),
    "checkpoint": _load,
    "checkpoint with assign": _load_by_assignment,
    "data replaced": _set_data,
    "adapter": _adapt,
    "new parameter": _replace_parameter,
    "new layer": lambda model: model.__setitem__(2, nn.Linear(8, 1).to(model[0].weight)),
    "additional layer": lambda model: model.append(nn.Linear(1, 1).to(model[0].weight)),
    "no bias": _drop_bias,
    "tied": lambda model: setattr(model[0], "bias", model[0].bias),
    "frozen": lambda model: model[0].requires_grad_(False),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    "evaluation": lambda model: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_groups(change: str, double: TensorFactory) -> None:
    def train(accumulator: str | None) -> Gradients:
        manual_seed(3)
        case = build("plain_mlp", double)
        model, combination = case.model, COMBINATIONS["boltzmann"]()
        scorer = None if accumulator is None else MultiPose(model, combination, accumulator=accumulator)
        poses = case.make_poses(5)
        for changed in (False, True):
            if changed:
                CHANGES[change](model)
                poses = [pose.to(next(model.parameters()).dtype) for pose in poses]
            prediction = full_graph(model, poses, combination) if scorer is None else scorer(poses)
            loss_on_both(prediction).backward()
        return gradients_of(dict(model.named_parameters()))

    expected = train(None)
    for accumulator in ACCUMULATORS:
        with case_label(accumulator):
            assert_same_gradients(train(accumulator), expected, tolerance=1e-5 if change == "float32" else 1e-12)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_parameter_that_is_unfrozen_and_frozen(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    scorer = MultiPose(case.model, "boltzmann", accumulator=accumulator)
    first = case.model.get_parameter("0.weight")
    for requires_grad in (False, True, False):
        first.requires_grad_(requires_grad)
        scorer.zero_grad()
        loss_on_both(scorer(case.make_poses(3))).backward()
        assert (first.grad is not None) == requires_grad


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_dtype_and_mode_of_the_scorer_are_those_of_the_model(accumulator: str) -> None:
    scorer = MultiPose(mlp(4, 6, 1), learnable_boltzmann(0.7), accumulator=accumulator).to(torch.float64)
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.float64}
    assert scorer.eval().model.training is False
    assert scorer.train().model.training is True
    loss_on_both(scorer(torch.randn(3, 4, dtype=torch.float64).unbind())).backward()
    assert all(parameter.grad is not None for parameter in scorer.requires_grad_().parameters())

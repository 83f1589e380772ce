"""Gradients that are folded with factors of the device: the same as with factors of the host. On any device."""

import itertools

import pytest
import torch
from model_zoo import TensorFactory
from small_model import assert_gradients_close, small_mlp
from torch import Tensor, nn
from training_reference import case_label

import gradhooks
from gradhooks.accumulators.declared_weights import DeclaredWeights
from gradhooks.accumulators.host_memory import HostMemory
from gradhooks.testing import full_graph

GROUPS = [2, 0, 2, 1, 0, 2, 2, 0, 1]


@pytest.fixture
def _all_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeclaredWeights, "is_on_host", False)


class TwoFeatures(gradhooks.Combination):
    """`sum_i w_i (y_i + y_i^2)` with `w = softmax(-y)`, whose coefficients need two features."""

    def forward(self, predictions: Tensor) -> Tensor:
        return (predictions.neg().softmax(0) * (predictions + predictions.square())).sum(0)

    def stream_weights(self, predictions: Tensor) -> gradhooks.StreamWeights:
        return gradhooks.StreamWeights(-predictions, torch.stack([predictions, predictions.square()], 1))


COMBINATIONS = {
    "min": lambda: gradhooks.combinations.Min(scale=3.0),
    "sharp max": gradhooks.combinations.Max,
    "boltzmann": gradhooks.combinations.Boltzmann,
    "cold boltzmann": lambda: gradhooks.combinations.Boltzmann(0.001),
    "two features": TwoFeatures,
}


def reference(poses: Tensor, groups: list[int] | None, combination: nn.Module) -> nn.Module:
    model = small_mlp().to(poses.device)
    call = lambda model, pose: model(pose).squeeze(-1)  # noqa: E731
    full_graph(model, poses, combination, groups, call=call).combined.sum().backward()
    return model


@pytest.mark.usefixtures("_all_on_a_device")
def test_gradients_are_those_of_the_full_graph(double: TensorFactory) -> None:
    for (name, make), groups, size in itertools.product(COMBINATIONS.items(), (None, GROUPS), (1, 4)):
        with case_label(name, groups, size):
            poses = 3 * double.randn(len(GROUPS), 4)
            expected = reference(poses, groups, make())
            model = small_mlp().to(poses.device)
            model.load_state_dict(expected.state_dict())
            scorer = gradhooks.MultiPose(model, make(), accumulator="stream", memory=0, chunk_size=size)
            scorer(poses, groups=groups).combined.sum().backward()
            assert scorer.report.accumulator == "stream"
            assert scorer.report.recomputed == 0
            assert_gradients_close(model, expected)


@pytest.mark.usefixtures("_all_on_a_device")
def test_a_declaration_that_is_not_finite_has_no_weight(double: TensorFactory) -> None:
    class Unsure(gradhooks.combinations.Min):
        def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> gradhooks.StreamWeights:
            declared = super().stream_weights(predictions, weights)
            assert declared.log_weights is not None
            bad = torch.where(predictions > 0, torch.nan, declared.log_weights)
            return gradhooks.StreamWeights(bad)

    poses = double.randn(6, 4)
    expected = reference(poses, None, gradhooks.combinations.Min(scale=3.0))
    model = small_mlp().to(poses.device)
    model.load_state_dict(expected.state_dict())
    scorer = gradhooks.MultiPose(model, Unsure(scale=3.0), accumulator="stream", memory=0)
    with pytest.warns(gradhooks.errors.GradhooksWarning, match="do not explain"):
        scorer(poses).combined.sum().backward()
    assert_gradients_close(model, expected)


def test_memory_of_the_host_is_given_out_in_parts() -> None:
    memory = HostMemory(1000, pinned=False)
    parts = [memory.empty((3, 5), torch.float64), memory.empty((), torch.float32), memory.empty((0, 2), torch.int64)]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [tuple(part.shape) for part in parts] == [(3, 5), (), (0, 2)]
    assert parts[0].eq(0).all()
    assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()
    large = memory.empty((400,), torch.float64)
    assert large.untyped_storage().nbytes() == 3200

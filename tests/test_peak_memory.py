"""Peak memory does not grow with the number of poses, and is that of one plain training step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import mlp
from model_zoo.layers import ConvNet
from torch import Tensor, nn

import gradhooks
from gradhooks.engine.flat_sums import FLAT_BYTES
from gradhooks.profiling.peak_memory import PeakMemory
from gradhooks.testing import full_graph


class Tokens(nn.Module):
    """A transformer whose graph takes more memory than its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(tokens.unsqueeze(0)).mean(1)).squeeze(0)


class Rows(nn.Module):
    """Scores many atoms and averages them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 32, 32, 1)

    def forward(self, atoms: Tensor) -> Tensor:
        return self.net(atoms).mean(0)


# Builder of the model, shape of a pose.
LARGE_GRAPH: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "atoms": (Rows, (512, 8)),
    "tokens": (Tokens, (96, 16)),
    "image": (lambda: ConvNet(nn.BatchNorm2d), (2, 48, 48)),
}
LARGE_PARAMETERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "wide": (lambda: mlp(64, 256, 256, 1), (64,))
}
MODELS = {**LARGE_GRAPH, **LARGE_PARAMETERS}


def make_model_and_poses(name: str, count: int) -> tuple[nn.Module, list[Tensor]]:
    make, shape = MODELS[name]
    return make(), [torch.randn(shape) for _ in range(count)]


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def peak(step: Callable[[], Tensor]) -> int:
    with PeakMemory() as memory:
        step().sum().backward()
    return memory.peak


def peak_of_group(name: str, count: int, combination: Any, accumulator: str) -> int:
    model, poses = make_model_and_poses(name, count)
    scorer = gradhooks.MultiPose(model, combination, accumulator=accumulator, memory=0)
    # The first batch also copies small parameters, to find out whether forwards change them.
    scorer(poses).combined.sum().backward()
    model.zero_grad()
    return peak(lambda: scorer(poses).combined)


def peak_of_one_step(name: str) -> int:
    """Measure a plain step of a loop over poses, in which the gradients of the pose before exist already."""
    model, (first, second) = make_model_and_poses(name, 2)
    model(first).sum().backward()
    return parameter_bytes(model) + peak(lambda: model(second))


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_graphs_and_parameters(name: str) -> None:
    model, (pose,) = make_model_and_poses(name, 1)
    with PeakMemory() as memory:
        kept = model(pose)
    assert kept.requires_grad
    assert (memory.peak > 5 * parameter_bytes(model)) == (name in LARGE_GRAPH)


@pytest.mark.parametrize("accumulator", ["stream", "recompute"])
@pytest.mark.parametrize("combination", ["mean", gradhooks.combinations.Min(scale=1.0), "boltzmann"], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_does_not_grow_with_the_poses(name: str, combination: Any, accumulator: str) -> None:
    # All poses are significant. A sharp combination might skip all but one of few poses.
    few, many = (peak_of_group(name, count, combination, accumulator) for count in (4, 64 if name == "atoms" else 16))
    assert many == pytest.approx(few, rel=0.02)


@pytest.mark.parametrize("accumulator", ["stream", "recompute"])
@pytest.mark.parametrize("combination", ["mean", "min"])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_that_of_one_plain_step(name: str, combination: str, accumulator: str) -> None:
    assert peak_of_group(name, 8, combination, accumulator) <= 1.03 * peak_of_one_step(name)


@pytest.mark.parametrize("name", MODELS)
def test_two_sums_cost_one_more_copy_of_the_gradients(name: str) -> None:
    model = make_model_and_poses(name, 1)[0]
    small = sum(each.nbytes for each in model.parameters() if each.nbytes <= FLAT_BYTES)  # added in one block
    another_copy = parameter_bytes(model) + small
    assert peak_of_group(name, 8, "boltzmann", "stream") <= 1.03 * (peak_of_one_step(name) + another_copy)
    assert peak_of_group(name, 8, "boltzmann", "recompute") <= 1.03 * peak_of_one_step(name)


@pytest.mark.parametrize("accumulator", ["stream", "recompute"])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_with_a_loss_on_each_pose(name: str, accumulator: str) -> None:
    model, poses = make_model_and_poses(name, 16)
    scorer = gradhooks.MultiPose(model, "mean", accumulator=accumulator)

    def step() -> Tensor:
        combined, predictions = scorer(poses)
        return combined.square() + predictions.square().mean()

    # A stream recomputes the poses that the loss reads directly while its sum still exists.
    sums = parameter_bytes(model) if accumulator == "stream" else 0
    # The audit of the first batch holds copies of all parameters, then of the gradients.
    assert peak(step) <= 1.03 * (peak_of_one_step(name) + 2 * parameter_bytes(model))
    assert peak(step) <= 1.03 * (peak_of_one_step(name) + sums)


@pytest.mark.parametrize("combination", ["mean", "boltzmann"])
@pytest.mark.parametrize("accumulator", ["stream", "recompute"])
def test_a_shared_input_has_one_gradient(accumulator: str, combination: str) -> None:
    def peak_of(count: int) -> int:
        scorer = gradhooks.MultiPose(
            mlp(8, 1), combination, accumulator=accumulator, call=lambda model, pose: model(pose[0]).mean(0) + pose[1]
        )
        pocket = torch.randn(4096, 8, requires_grad=True)
        poses = [(pocket, torch.randn(1)) for _ in range(count)]
        return peak(lambda: scorer(poses).combined)

    assert peak_of(32) == pytest.approx(peak_of(4), rel=0.02)


@pytest.mark.parametrize("name", LARGE_GRAPH)
def test_the_meter_measures_that_the_full_graph_grows(name: str) -> None:
    model, poses = make_model_and_poses(name, 8)
    full = peak(lambda: full_graph(model, poses, gradhooks.combinations.Mean()).combined)
    assert full > 4 * peak_of_group(name, 8, "mean", "stream")


def test_store_grows_by_the_gradients_of_each_pose() -> None:
    few, many = (peak_of_group("wide", count, "mean", "store") for count in (4, 8))
    assert many - few == pytest.approx(4 * parameter_bytes(make_model_and_poses("wide", 1)[0]), rel=0.02)


@pytest.mark.parametrize("accumulator", ["stream", "recompute"])
def test_the_peak_grows_with_the_chunk_size(accumulator: str) -> None:
    make, shape = MODELS["atoms"]
    model, poses = make(), torch.randn(16, *shape)

    def call(model: nn.Module, atoms: Tensor) -> Tensor:
        return torch.stack([model(one) for one in atoms])

    def peak_in_chunks_of(size: int) -> int:
        scorer = gradhooks.MultiPose(model, "mean", accumulator=accumulator, chunk_size=size, call=call)
        return peak(lambda: scorer(poses).combined)

    one, four, all_at_once = map(peak_in_chunks_of, (1, 4, 16))
    assert one < four <= 4 * one
    assert four < all_at_once / 2

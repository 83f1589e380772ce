"""torch.compile of the model and of the scorer."""

import copy

import pytest
import torch
from small_model import random_poses, small_mlp
from torch import Tensor

import gradhooks
from gradhooks.testing import full_graph

# Dynamo and functorch use what newer releases of torch themselves deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("accumulator", ["store", "stream", "recompute", "auto"])
@pytest.mark.parametrize("how", ["the model before", "the model after", "in place", "the scorer"])
def test_gradients_of_compiled_models(how: str, accumulator: str) -> None:
    model, poses = small_mlp(), random_poses()
    reference = copy.deepcopy(model)
    full_graph(reference, poses, gradhooks.combinations.Boltzmann()).combined.sum().backward()
    inner = torch.compile(model, backend="aot_eager") if how == "the model before" else model
    scorer = gradhooks.MultiPose(inner, "boltzmann", accumulator=accumulator)
    if how == "the model after":
        scorer.model = torch.compile(model, backend="aot_eager")
    if how == "in place":
        model.compile(backend="aot_eager")
    run = torch.compile(scorer, backend="aot_eager") if how == "the scorer" else scorer
    for _ in range(2):
        model.zero_grad()
        run(poses).combined.sum().backward()
    for leaf, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-10, atol=1e-14)


def test_shadow_parameters_cause_no_recompilation() -> None:
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compilations.append(len(inputs))
        return graph

    scorer = gradhooks.MultiPose(torch.compile(small_mlp(), backend=backend), "mean", accumulator="stream")
    for _ in range(4):
        scorer(random_poses()).combined.sum().backward()
    assert len(compilations) == 1

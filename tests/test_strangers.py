"""Models that nobody here wrote train as in plain PyTorch: two steps of Adam in float64, with every accumulator."""

import copy
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from module_contents import seed_everything
from strangers import STRANGERS, Stranger, build_stranger
from torch import Tensor
from training_reference import Gradients, case_label, gradients_of, relative_errors

import gradhooks
from gradhooks.errors import GradhooksError
from gradhooks.testing import full_graph

WAYS: dict[str, dict[str, Any]] = {
    "stream": {"accumulator": "stream", "memory": 0},
    "recompute": {"accumulator": "recompute", "memory": 0},
    "auto": {"memory": 0},
    "default memory": {},
}


@pytest.fixture
def _double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Trained(NamedTuple):
    """What two steps leave: gradients and buffers after each, and the states of the generators at the end."""

    gradients: list[Gradients]
    buffers: list[dict[str, Tensor]]
    generators: tuple[Any, ...]


def train(made: Stranger, options: dict[str, Any] | None) -> Trained:
    """Train a copy of the model in plain PyTorch, or with the options of `MultiPose`."""
    model, combination = copy.deepcopy(made.model), gradhooks.combinations.Boltzmann()
    scorer = None if options is None else gradhooks.MultiPose(model, combination, call=made.call, **options)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=1e-3, eps=1e-5
    )  # far above the rounding of gradients that are zero
    gradients, buffers = [], []
    seed_everything(4)
    for _ in range(2):
        poses = copy.deepcopy(made.poses)
        optimizer.zero_grad()
        prediction = full_graph(model, poses, combination, call=made.call) if scorer is None else scorer(poses)
        (prediction.combined.square().sum() + 0.1 * prediction.per_pose.square().sum()).backward()
        gradients.append(gradients_of(dict(model.named_parameters())))
        optimizer.step()
        buffers.append({name: buffer.detach().clone() for name, buffer in model.named_buffers()})
    return Trained(gradients, buffers, (torch.get_rng_state().tolist(), random.getstate()))


def assert_same(result: Trained, expected: Trained, tolerance: float) -> None:
    for step in range(2):
        for name, gradient in expected.gradients[step].items():
            assert (result.gradients[step][name] is None) == (gradient is None), f"step {step}: .grad of {name}"
        errors = relative_errors(result.gradients[step], expected.gradients[step])
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        assert not wrong, f"step {step}: gradients {wrong}"
        for name, buffer in expected.buffers[step].items():
            torch.testing.assert_close(
                result.buffers[step][name], buffer, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"buffer {name}"
            )
    assert result.generators == expected.generators, "random generators"


QUICK = [name for name, entry in STRANGERS.items() if entry.quick]
LONG = [name for name, entry in STRANGERS.items() if not entry.quick]


@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.usefixtures("_double_by_default")
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_a_stranger_trains_as_in_plain_pytorch(name: str) -> None:
    made = build_stranger(name)
    expected = train(made, None)
    assert any(gradient is not None for gradient in expected.gradients[0].values())
    refusal = STRANGERS[name].refusal
    for way, options in WAYS.items():
        if refusal is not None and "memory" in options:
            with pytest.raises(GradhooksError, match=re.escape(refusal)):
                train(made, options)
            continue
        with case_label(way):
            assert_same(train(made, options), expected, STRANGERS[name].tolerance)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert_with_dropout", "efficientnet", pytest.param("llama", marks=pytest.mark.long)])
def test_gradcheck_passes_a_stranger(name: str) -> None:
    made = build_stranger(name)
    made.model.train(name == "efficientnet")  # the true gradient of BERT's key.bias is zero, without dropout too
    result = gradhooks.gradcheck(made.model, made.poses, "boltzmann", call=made.call)
    assert result.passed, str(result)
    assert all(error <= STRANGERS[name].tolerance for error in result.errors.values())

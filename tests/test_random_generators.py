"""Random generators other than PyTorch's default: found wherever a forward finds them, or named by `generators=`."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradhooks
from gradhooks import random_state
from gradhooks.random_state import generator_source, same_state

pytestmark = pytest.mark.usefixtures("_on_the_device")

TORCH = torch.Generator()
NUMPY = np.random.default_rng(0)
LEGACY = np.random.RandomState(0)
PYTHON = random.Random(0)  # noqa: S311

SOURCES: dict[str, tuple[Callable[[], float], object]] = {
    "torch.Generator": (lambda: torch.rand((), generator=TORCH).item(), TORCH),
    "numpy.random.Generator": (NUMPY.random, NUMPY),
    "numpy.random.RandomState": (LEGACY.random_sample, LEGACY),
    "module numpy.random": (lambda: float(np.random.rand()), np.random),  # noqa: NPY002
    "random.Random": (PYTHON.random, PYTHON),
    "module random": (random.random, random),
}


def _set_gauss_next(generator: random.Random) -> None:
    version, internal, _ = generator.getstate()
    generator.setstate((version, internal, 0.5))


@pytest.mark.parametrize("in_memory", [True, False])
def test_changes_of_pythons_generator_are_seen(in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is compared, or, where that is not laid out as expected, its state."""
    if not in_memory:
        monkeypatch.setattr(random_state, "_twister_of", lambda _: None)
    generator = random.Random(1)  # noqa: S311
    source = generator_source(generator)
    assert source is not None
    first = known = source.get()
    assert source.is_still(known) is in_memory
    assert source.read_if_changed(known) is known
    changes: list[Callable[[], object]] = [
        generator.random,
        lambda: generator.gauss(0, 1),  # keeps a second number
        lambda: generator.gauss(0, 1),  # returns it, without a draw
        lambda: _set_gauss_next(generator),
        lambda: generator.seed(3),
    ]
    for change in changes:
        change()
        state = source.read_if_changed(known)
        assert state is not known
        known = state
    source.set(first)
    assert generator.random() == random.Random(1).random()  # noqa: S311


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.draw = draw

    def forward(self, pose: Tensor) -> Tensor:
        return self.linear(pose * (1 + self.draw()))


def poses() -> list[Tensor]:
    return [torch.randn(4) for _ in range(5)]


@pytest.mark.parametrize("accumulator", ["recompute", "stream", "auto"])
@pytest.mark.parametrize("source", [source for source in SOURCES if not source.startswith("module")])
def test_generators_hidden_in_a_function_are_found(source: str, accumulator: str) -> None:
    draw, generator = SOURCES[source]
    source_of = generator_source(generator)
    assert source_of is not None
    model, given = Noisy(draw), poses()
    state = source_of.get()
    torch.stack([model(pose) for pose in given]).mean().backward()
    expected, drawn = [parameter.grad for parameter in model.parameters()], source_of.get()
    source_of.set(state)
    model.zero_grad()
    gradhooks.MultiPose(model, "mean", accumulator=accumulator, memory=0)(given).combined.sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
    assert same_state(source_of.get(), drawn)


def hidden_noise() -> Callable[[], float]:
    """Return numbers that nobody can draw again: those of an iterator."""
    return iter(torch.rand(200).tolist()).__next__


@pytest.mark.parametrize(("audit", "message"), [
    (True, "a second run of a pose gives another prediction or gradient than the first.*generators="),
    (False, r"pose \d of 5: its second run differs.*generators="),
])  # fmt: skip
def test_a_second_run_that_differs_is_refused(audit: bool, message: str) -> None:
    model = Noisy(hidden_noise())
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", audit=audit)
    with pytest.raises(gradhooks.errors.ReplayError, match=message):
        scorer(poses()).combined.sum().backward()
    assert model.linear.weight.grad is None


@pytest.mark.parametrize("combination", ["mean", "boltzmann"])
def test_a_model_whose_second_run_differs_runs_once(combination: str) -> None:
    model = Noisy(hidden_noise())
    scorer = gradhooks.MultiPose(model, combination, memory=0)
    prediction = scorer(poses())
    prediction.combined.sum().backward()
    assert (scorer.report.accumulator, scorer.report.recomputed) == ("stream", 0)
    assert "does not agree" in scorer.report.reason
    # dy/dw = pose * (1 + noise), so w . g is the combined derivative of y without the bias.
    assert model.linear.weight.grad is not None
    expected = (prediction.coefficients() * (prediction.per_pose - model.linear.bias)).sum()
    torch.testing.assert_close((model.linear.weight.grad * model.linear.weight).sum(), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_generators_are_restored_for_the_second_run(source: str) -> None:
    draw, generator = SOURCES[source]
    model = Noisy(draw)
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", generators=[generator], audit=False)
    seen: list[Tensor] = []
    scorer.call = lambda model, pose: seen.append(pose) or model(pose)  # type: ignore[func-returns-value]
    prediction = scorer(poses())
    prediction.combined.sum().backward()
    after = draw()
    # dy/dw = pose * (1 + noise), so the mean gradient satisfies w . g = mean of y without the bias.
    assert model.linear.weight.grad is not None
    torch.testing.assert_close(
        (model.linear.weight.grad * model.linear.weight).sum(), (prediction.per_pose - model.linear.bias).mean()
    )
    assert len(seen) == 10
    assert after not in [draw() for _ in range(3)]


@pytest.mark.parametrize("source", ["default of torch", *SOURCES])
def test_a_forward_that_begins_to_draw_in_a_later_batch(source: str) -> None:
    """What no forward drew from is not read before each pose, so this batch starts again."""
    draw, generator = SOURCES.get(source, (lambda: torch.rand(()).item(), None))
    model = Noisy(lambda: 0.0)
    generators = [] if generator is None else [generator]
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", generators=generators, audit=False)
    for batch in range(3):
        model.draw = draw if batch == 2 else model.draw
        model.zero_grad()
        prediction = scorer(poses())
        prediction.combined.sum().backward()
        expected = (prediction.per_pose - model.linear.bias).mean()
        assert model.linear.weight.grad is not None
        torch.testing.assert_close((model.linear.weight.grad * model.linear.weight).sum(), expected)


@pytest.mark.parametrize("accumulator", ["store", "stream"])
def test_accumulators_without_second_run_need_no_generators(accumulator: str) -> None:
    model = Noisy(random.random)
    gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)(poses()).combined.sum().backward()
    assert model.linear.weight.grad is not None


def test_an_object_that_is_not_a_generator_is_refused() -> None:
    with pytest.raises(TypeError, match="generators takes generators"):
        gradhooks.MultiPose(nn.Linear(4, 1), generators=[3])(poses())

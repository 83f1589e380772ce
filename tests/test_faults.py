"""An exception at any pose and in any phase leaves the model unchanged, and the next group is exact."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from chosen_device import needs
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import ACCUMULATORS_AND_PLAIN, options_of
from unwatched import Unwatched

import gradhooks
from gradhooks.testing import full_graph

pytestmark = pytest.mark.usefixtures("_on_the_device")

POSES = 6


class Model(nn.Module):
    """Draws random numbers, counts its forwards, keeps statistics, and fails at a given forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(8, 1)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.log = Unwatched(runs=0, fails_at_run=None)
        self.fault: BaseException = RuntimeError("injected")

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(self.first(pose)).tanh())
        self.count += 1
        if self.log.runs == self.log.fails_at_run:
            raise self.fault
        self.log.runs += 1
        return self.last(hidden).mean(0)


@dataclass
class State:
    """Everything that a fault must not change."""

    tensors: list[Tensor]
    gradients: list[Tensor | None]
    hooks: list[int]
    modes: list[bool]
    random: Tensor
    parameters: list[int]

    @staticmethod
    def of(model: nn.Module) -> "State":
        return State(
            [tensor.detach().clone() for tensor in model.state_dict().values()],
            [None if leaf.grad is None else leaf.grad.clone() for leaf in model.parameters()],
            [len(leaf._backward_hooks or ()) for leaf in model.parameters()]
            + [len(getattr(leaf, "_post_accumulate_grad_hooks", None) or ()) for leaf in model.parameters()],
            [module.training for module in model.modules()],
            torch.get_rng_state(),
            [id(leaf) for leaf in model.parameters()],
        )

    def assert_equal(self, other: "State") -> None:
        assert all(map(torch.equal, self.tensors, other.tensors))
        for own, others in zip(self.gradients, other.gradients, strict=True):
            assert (own is None) == (others is None)
            assert own is None or others is None or torch.equal(own, others)
        assert (self.hooks, self.modes, self.parameters) == (other.hooks, other.modes, other.parameters)
        assert torch.equal(self.random, other.random)


def make_model(preset: bool = True) -> Model:
    manual_seed(1)
    model = Model().double()
    if preset:
        for leaf in model.parameters():
            leaf.grad = torch.full_like(leaf, 7.0)
    return model


def copy_with_gradients(model: Model) -> Model:
    reference = copy.deepcopy(model)  # without gradients
    for leaf, original in zip(reference.parameters(), model.parameters(), strict=True):
        leaf.grad = None if original.grad is None else original.grad.clone()
    return reference


def make_poses() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(POSES)]


def assert_next_group_is_exact(scorer: gradhooks.MultiPose, model: Model) -> None:
    model.log.fails_at_run = None
    reference = copy_with_gradients(model)
    manual_seed(9)
    full_graph(reference, make_poses(), scorer.combination).combined.sum().backward()
    manual_seed(9)
    scorer(make_poses()).combined.sum().backward()
    for (name, leaf), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(
            leaf.grad, expected.grad, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n} {text}"
        )


FAULTS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: ValueError("injected"),
    "interrupt": KeyboardInterrupt,
    "out of memory": lambda: torch.OutOfMemoryError("injected: CUDA out of memory"),
}


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
@pytest.mark.parametrize("pose", range(POSES))
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_the_forward_of_a_pose(accumulator: str, pose: int, fault: str) -> None:
    model = make_model()
    scorer = gradhooks.MultiPose(model, "boltzmann", **options_of(accumulator))
    before = State.of(model)
    model.log.fails_at_run, model.fault = pose, FAULTS[fault]()
    with pytest.raises(type(model.fault)):
        scorer(make_poses())
    before.assert_equal(State.of(model))
    assert_next_group_is_exact(scorer, model)


@pytest.mark.parametrize("pose", range(POSES))
@pytest.mark.parametrize("accumulator", ["recompute", "stream"])
def test_fault_in_a_second_run_during_the_outer_backward(accumulator: str, pose: int) -> None:
    """Afterwards the same backward can run again, and is exact."""
    model = make_model()
    scorer = gradhooks.MultiPose(model, "mean", accumulator=accumulator, audit=False)
    reference = copy_with_gradients(model)
    manual_seed(9)
    full_graph(reference, make_poses(), scorer.combination).per_pose.square().sum().backward()
    manual_seed(9)
    loss = scorer(make_poses()).per_pose.square().sum()
    before = State.of(model)
    model.log.fails_at_run = POSES + pose
    with pytest.raises(RuntimeError, match="injected"):
        loss.backward(retain_graph=True)
    before.assert_equal(State.of(model))
    model.log.fails_at_run = None
    loss.backward()
    for leaf, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-10, atol=1e-12)
    assert_next_group_is_exact(scorer, model)


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
@pytest.mark.parametrize("pose", range(POSES))
def test_fault_in_the_progress_callback(accumulator: str, pose: int) -> None:
    model = make_model()
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        assert total == POSES
        calls.append(done)
        if len(calls) == pose + 1:
            raise KeyboardInterrupt

    scorer = gradhooks.MultiPose(model, "min", progress=progress, **options_of(accumulator))
    before = State.of(model)
    with pytest.raises(KeyboardInterrupt):
        scorer(make_poses())
    assert calls == list(range(1, pose + 2))
    before.assert_equal(State.of(model))
    scorer.progress = False
    assert_next_group_is_exact(scorer, model)


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_fault_in_a_users_hook_at_delivery(accumulator: str) -> None:
    needs("errors in hooks of a backward")
    model = make_model()
    scorer = gradhooks.MultiPose(model, "boltzmann", **options_of(accumulator))

    def fail(_: Tensor) -> None:
        raise RuntimeError("hook of the user")

    handle = model.last.bias.register_hook(fail)
    with pytest.raises(RuntimeError, match="hook of the user"):
        scorer(make_poses()).combined.sum().backward()
    handle.remove()
    model.zero_grad()
    assert_next_group_is_exact(scorer, without_gradients(scorer))


def without_gradients(scorer: gradhooks.MultiPose) -> Model:
    """Return the model without gradients: which of them autograd delivered before the fault is undefined."""
    model = scorer.model
    assert isinstance(model, Model)
    model.zero_grad()
    return model


class Broken(gradhooks.Combination):
    """Fails in one of its methods."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, predictions: Tensor) -> Tensor:
        if self.where == "forward":
            raise RuntimeError("injected")
        return predictions.mean(0)

    def stream_weights(self, predictions: Tensor) -> gradhooks.StreamWeights:
        if self.where == "stream_weights":
            raise RuntimeError("injected")
        if self.where == "shape":
            return gradhooks.StreamWeights(log_weights=predictions.new_zeros(3))
        return gradhooks.StreamWeights()


@pytest.mark.parametrize("accumulator", ["stream", "auto"])
@pytest.mark.parametrize(("where", "message"), [("stream_weights", "injected"), ("shape", "Broken.*shape")])
def test_fault_in_a_combination(accumulator: str, where: str, message: str) -> None:
    model = make_model()
    before = State.of(model)
    with pytest.raises((RuntimeError, gradhooks.errors.CombinationError), match=message):
        gradhooks.MultiPose(model, Broken(where), **options_of(accumulator))(make_poses())
    before.assert_equal(State.of(model))


def test_fault_in_the_forward_of_a_combination_leaves_no_trace() -> None:
    model = make_model()
    before = State.of(model)
    with pytest.raises(RuntimeError, match="injected"):
        gradhooks.MultiPose(model, Broken("forward"))(make_poses())
    before.assert_equal(State.of(model))
    assert all(leaf.grad is not None and (leaf.grad == 7).all() for leaf in model.parameters())


def test_fault_notes_say_which_pose() -> None:
    model = make_model()
    model.log.fails_at_run = 4
    with pytest.raises(RuntimeError) as caught:
        gradhooks.MultiPose(model)(make_poses())
    notes: list[Any] = getattr(caught.value, "__notes__", ["pose 4 of 6"])  # Python 3.11
    assert any("pose 4 of 6" in note for note in notes)

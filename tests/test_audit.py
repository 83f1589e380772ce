"""The audit: what would give a wrong gradient is exact, or refused with its cause, before poses are intercepted."""

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chosen_device import needs
from torch import Tensor, nn
from training_reference import ACCUMULATORS

import gradhooks
from gradhooks.errors import NonlinearBackwardError, OutlivingGraphError, UnregisteredTensorError

pytestmark = pytest.mark.usefixtures("_on_the_device")

POSES = 5
GLOBAL_CACHE: dict[str, Tensor] = {}


class Model(nn.Module):
    """Two layers; `keep` sees the hidden values."""

    def __init__(self, keep: Callable[["Model", Tensor], object] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.last = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.kept: Any = None
        self.list: list[Any] = []
        self.helper = SimpleNamespace(aux=torch.zeros(()))
        self.keep = keep

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose).tanh()
        if self.keep is not None:
            self.keep(self, hidden)
        return self.last(hidden).squeeze(-1)


def poses() -> list[Tensor]:
    return list(torch.randn(POSES, 4, dtype=torch.float64))


def side_loss(model: Model, hidden: Tensor) -> None:
    model.kept = hidden.square().sum()


def running_mean(model: Model, hidden: Tensor) -> None:
    model.mean = 0.9 * model.mean + 0.1 * hidden


def memoised(model: Model, hidden: Tensor) -> None:
    model.list = model.list or [hidden]


def in_a_global(model: Model, hidden: Tensor) -> None:
    GLOBAL_CACHE["hidden"] = hidden + model.first.weight.sum()


def of_parameters_only(model: Model, hidden: Tensor) -> None:
    del hidden
    model.helper.aux = model.first.weight.sum()


OUTLIVING = {
    "kept": side_loss,
    "mean": running_mean,
    r"list\[0\]": memoised,
    "a dictionary that is no attribute": in_a_global,
    r"helper\.aux": of_parameters_only,
}


@pytest.mark.parametrize("place", OUTLIVING)
def test_a_graph_that_outlives_its_forward_is_refused_by_place(place: str) -> None:
    model = Model(OUTLIVING[place]).double()
    before = copy.deepcopy(model.state_dict())
    for accumulator in ACCUMULATORS:
        scorer = gradhooks.MultiPose(model, "min", accumulator=accumulator, memory=0)
        with pytest.raises(OutlivingGraphError, match=rf"{place}.*holds a tensor with a graph.*prediction\.side"):
            scorer(poses())
    torch.testing.assert_close(model.state_dict(), before)
    assert (model.kept, model.list) == (None, [])
    gradhooks.MultiPose(model, "min", audit=False, memory=0)(poses())


def test_a_cache_of_the_audit_that_cannot_be_cleared_is_an_error_later() -> None:
    needs("errors in hooks of a backward")

    def keep(model: Model, hidden: Tensor) -> None:
        del hidden
        GLOBAL_CACHE["weights"] = model.first.weight.sum()

    model = Model(keep).double()
    with pytest.raises(OutlivingGraphError):
        gradhooks.MultiPose(model, "min", memory=0)(poses())
    with pytest.raises(OutlivingGraphError, match="clear the cache"):
        GLOBAL_CACHE["weights"].sum().backward()


def test_hooks_that_collect_activations_are_refused() -> None:
    model, collected = Model().double(), []
    model.first.register_forward_hook(lambda *seen: collected.append(seen[-1]))
    with pytest.raises(OutlivingGraphError, match="a list that is no attribute of the model"):
        gradhooks.MultiPose(model, "min", memory=0)(poses())
    gradhooks.MultiPose(model, "min")(poses()).combined.backward()  # plain poses are PyTorch
    assert len(collected) > POSES


def test_weight_and_spectral_normalization_are_no_side_losses() -> None:
    for normalize in (torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm):
        model = Model().double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.first = normalize(model.first)
        prediction = gradhooks.MultiPose(model, "min", memory=0)(poses())
        prediction.combined.backward()


class _WithOwnLoss(torch.autograd.Function):
    """Passes its input on, and adds a loss of its own in the backward."""

    @staticmethod
    def forward(_: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        del loss
        return hidden.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Any:
        return gradient, torch.ones((), dtype=gradient.dtype)


class WithOwnLoss(Model):
    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose)
        return self.last(_WithOwnLoss.apply(hidden, hidden.square().sum())).squeeze(-1)


class Clamped(Model):
    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
        return self.last(hidden).squeeze(-1)


class Guided(Model):
    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient.clamp(min=0))
        return self.last(hidden).squeeze(-1)


@pytest.mark.parametrize("kind", [WithOwnLoss, Clamped, Guided])
@pytest.mark.parametrize("combination", ["mean", "min"])
def test_a_backward_that_is_not_linear(kind: type[Model], combination: str) -> None:
    model, given = kind().double(), poses()
    combine = gradhooks.registry.combinations.create(combination)
    combine(torch.stack([model(pose) for pose in given])).square().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    for accumulator in ("recompute", "auto"):
        model.zero_grad()
        scorer = gradhooks.MultiPose(model, combination, accumulator=accumulator, memory=0)
        scorer(given).combined.square().backward()
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
        assert (scorer.report.accumulator, scorer.report.skipped) == ("recompute", 0)
        assert "not linear" in scorer.report.reason
    for accumulator in ("stream", "store"):
        with pytest.raises(NonlinearBackwardError, match=r"hook clamps it.*accumulator='auto'"):
            gradhooks.MultiPose(model, combination, accumulator=accumulator, memory=0)(given)


@pytest.mark.parametrize("place", ["closure", "object"])
def test_something_trained_outside_a_frozen_model_is_refused(place: str) -> None:
    model = Model().double().requires_grad_(False)
    outside = torch.randn(4, dtype=torch.float64, requires_grad=True)
    given = poses()
    options: dict[str, Any] = {"call": lambda model, pose: model(pose + outside)}
    if place == "object":
        hidden = type("Hidden", (), {"__slots__": ("value",)})()
        hidden.value = outside
        options = {"call": lambda model, pose: model(pose + hidden.value)}
    with pytest.raises(UnregisteredTensorError, match=r"pose 0 depends on a tensor that requires grad of shape \(4,\)"):
        gradhooks.MultiPose(model, "mean", memory=0, **options)(given)
    gradhooks.MultiPose(model, "mean", **options)(given).combined.backward()
    assert outside.grad is not None


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.5)
        self.count = 0

    def forward(self, pose: Tensor) -> Tensor:
        self.count += 1
        return self.dropout(self.linear(pose)).squeeze(-1)


def forwards(scorer: Any) -> int:
    """Return how often a batch runs the model, also where the count is put back."""
    seen: list[None] = []
    handle = scorer.model.register_forward_pre_hook(lambda *_: seen.append(None))
    scorer(poses()).combined.sum().backward()
    handle.remove()
    return len(seen)


def test_the_audit_runs_once_for_each_mode_and_set_of_parameters() -> None:
    model = Counting().double()
    scorer = gradhooks.MultiPose(model, "mean", accumulator="stream", memory=0)
    audited = POSES + 2
    assert [forwards(scorer) for _ in range(3)] == [audited, POSES, POSES]
    model.eval()
    assert [forwards(scorer) for _ in range(2)] == [audited, POSES]
    model.train()
    assert forwards(scorer) == POSES
    model.linear.bias.requires_grad_(False)
    assert [forwards(scorer) for _ in range(2)] == [audited, POSES]
    assert forwards(gradhooks.MultiPose(model, "mean", accumulator="stream", memory=0, audit=False)) == POSES
    assert forwards(gradhooks.MultiPose(model, "mean")) == POSES


def test_the_audit_leaves_no_trace() -> None:
    results = []
    for audit in (True, False):
        torch.manual_seed(1)
        model, given = Counting().double(), poses()
        scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="stream", memory=0, audit=audit)
        scorer(given).combined.sum().backward()
        results.append([*(parameter.grad for parameter in model.parameters()), torch.get_rng_state(), model.count])
    assert all(
        one == other if isinstance(one, int) else torch.equal(one, other) for one, other in zip(*results, strict=True)
    )

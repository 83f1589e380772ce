"""gradcheck: it passes what is exact, finds what is silently wrong, and does not pass what it cannot compare."""

import math
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from changing_models import CHANGING
from model_state import unchanged
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from unwatched import Unwatched

import gradhooks
from gradhooks.engine import forward, model_state, pose_runner, rerun
from gradhooks.engine.leaf_validation import LeafValidator
from gradhooks.options import OPTION_NAMES
from gradhooks.profiling.check_result import CheckedAccumulator, GradientCheck
from gradhooks.profiling.content_differences import content_differences
from gradhooks.profiling.gradient_error import gradient_error, gradient_errors
from gradhooks.profiling.model_contents import read_contents

WITHOUT_AUDIT: dict[str, Any] = {"audit": False} if "audit" in OPTION_NAMES else {}
ROWS = ["store", "stream", "recompute", "auto", "memory=1GiB"]


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))


def poses(count: int = 4, width: int = 4) -> list[Tensor]:
    return list(torch.randn(count, width))


def matrices() -> list[Tensor]:
    return list(torch.randn(3, 6, 4))


def squares(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum() + prediction.per_pose.square().sum()


class With(nn.Module):
    """A network with a forward of its own."""

    def __init__(self, forward: Callable[[Any, Any], Tensor], **parts: Any) -> None:
        super().__init__()
        self.net = network()
        self.own_forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, pose: Any) -> Tensor:
        return self.own_forward(self, pose)


def float32_inside(model: Any, pose: Tensor) -> Tensor:
    return model.net(pose) + (pose.float() @ model.gate.float().T).softmax(0).std().to(pose.dtype)


PASSING: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "normalization": lambda: (
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)),
        matrices(),
        {"call": lambda model, pose: model(pose).mean(0)},
    ),
    "dropout in a stack": lambda: (nn.Sequential(network(), nn.Dropout(0.3)), torch.randn(9, 4), {}),
    "dropout in chunks": lambda: (nn.Sequential(network(), nn.Dropout(0.3)), torch.randn(9, 4), {"chunk_size": 2}),
    "groups": lambda: (network(), torch.randn(9, 4), {"groups": [0, 2, 1] * 3, "loss": squares}),
    "no combination": lambda: (network(), gradhooks.Groups(torch.randn(6, 4), [0, 1] * 3), {"loss": squares}),
    "TorchScript": lambda: (torch.jit.script(network()), poses(), {}),
    "poses that require grad": lambda: (
        network().requires_grad_(False),
        [(pose.requires_grad_(),) for pose in poses()],
        {},
    ),
    "poses with a graph": lambda: (network(), [nn.Linear(3, 4)(torch.randn(3)) for _ in range(4)], {}),
    "float32 inside": lambda: (With(float32_inside, gate=nn.Parameter(torch.randn(4, 4))), poses(), {}),
    "float32 only": lambda: (With(lambda model, pose: model.net(pose.float() @ torch.ones(4, 4))), poses(), {}),
    "poses dropped": lambda: (
        With(lambda model, pose: (model.net(pose) / (pose[0] > 0)).sqrt()),
        [pose.abs() * sign for pose, sign in zip(poses(), (1, -1, 1, 1), strict=True)],
        {"nonfinite": "drop", "call": lambda model, pose: model(pose).square()},
    ),
    "lazy modules": lambda: (
        nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1)),
        matrices(),
        {"call": lambda model, pose: model(pose).mean(0)},
    ),
    "attribute with a graph": lambda: (
        With(
            lambda model, pose: model.net(pose) * 1, first=weight_norm(nn.Linear(4, 4)), cache=network()(torch.ones(4))
        ),
        poses(),
        {"call": lambda model, pose: model(model.first(pose))},
    ),
    "learnable combination": lambda: (network(), poses(), {"combination": Learnable()}),
}


class Learnable(gradhooks.Combination):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, predictions: Tensor) -> Tensor:
        return (self.scale * predictions).logsumexp(0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("name", PASSING)
def test_what_is_exact_passes(name: str) -> None:
    model, inputs, options = PASSING[name]()
    options = {"combination": None if name == "no combination" else "boltzmann", **options}
    with nullcontext() if name == "lazy modules" else unchanged(model):
        result = gradhooks.gradcheck(model, inputs, **options)
    assert result.passed, result
    assert [row.name for row in result.rows] == ROWS
    assert max(result.errors.values()) < (1e-5 if "float32" in name else 1e-10)
    assert ("rounding errors of float32" in str(result)) == ("float32" in name)
    assert all(leaf.grad is None for leaf in model.parameters())
    assert ("in float64: " in str(result)) == (name == "float32 only")


def test_a_prediction_that_depends_on_nothing_is_named() -> None:
    model = With(lambda model, pose: model.net(pose), unused=nn.Linear(2, 2))
    result = gradhooks.gradcheck(model, poses(), "boltzmann")
    assert result.passed
    assert result.unused_parameters == ("unused.weight", "unused.bias")
    assert "no prediction depends on unused.weight" in str(result)
    assert "no prediction depends on unused.weight" in result._repr_html_()


# What goes wrong without an error where a cure is missing: the cure that is taken out, the model, what is reported.


def without_restoring(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model_state.ModelState, "_restore", lambda *_, **__: None)
    patch.setattr(rerun.DriftCheck, "refuse", lambda *_: None)


def without_fresh_containers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pose_runner, "fresh_containers", lambda pose: pose)
    patch.setattr(rerun.DriftCheck, "refuse", lambda *_: None)


def without_carrying_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(forward, "carry_over_data", lambda *_: None)


def without_validation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeafValidator, "_refuse", lambda *_: None)


def with_a_lost_pose(patch: pytest.MonkeyPatch) -> None:
    run_again = rerun.SecondRun.gradients

    def lose(self: Any, predictions: Tensor, cotangents: Tensor, selected: Tensor) -> Any:
        return run_again(self, predictions, cotangents, selected & (torch.arange(len(selected)) != 1))

    patch.setattr(rerun.SecondRun, "gradients", lose)


def nothing_taken_out(_: pytest.MonkeyPatch) -> None:
    """The cure is an audit, and these models are run without."""


def memoised(model: Any, pose: dict[str, Tensor]) -> Tensor:
    if "hidden" not in pose:
        pose["hidden"] = model.net[0](pose["x"])
    return model.net[1:](pose["hidden"])


def draws(source: Callable[[], object]) -> Callable[[Any, Tensor], Tensor]:
    def forward(model: Any, pose: Tensor) -> Tensor:
        source()  # which changes nothing but the generator
        return model.net(pose)

    return forward


def with_balance(model: Any, pose: Tensor) -> Tensor:
    model.balance = model.balance + model.gate(pose).square().mean()
    return model.net(pose) * model.gate(pose).sigmoid()


def hooked(model: Any, pose: Tensor) -> Tensor:
    hidden = model.net[0](pose)
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
    return model.net[1:](hidden)


def limited(model: Any, pose: Tensor) -> Tensor:
    weight = model.net[0].weight
    weight.data = torch.renorm(weight.data, 2, 0, 0.3)
    return model.net(pose)


def noisy(model: Any, pose: Tensor) -> Tensor:
    return model.net(pose * (1 + np.random.rand())) - 3000  # noqa: NPY002


def averaging(model: Any, pose: Tensor) -> Tensor:
    model.average.data.mul_(0.9).add_(0.1 * pose)
    return model.net(pose)


def counting(model: Any, pose: Tensor) -> Tensor:
    model.calls += 1
    model.log["seen"].append(model.calls)
    return model.net(pose)


def learned_inputs(model: Any, pose: Tensor) -> Tensor:
    return model.net((pose + CONTEXT.leaf).tanh())


CONTEXT = SimpleNamespace(leaf=torch.ones(4), zero=torch.zeros((), requires_grad=True))


class Average(nn.Module):
    """A place for a buffer in `With`."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))


Case = tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], nn.Module], str]
WRONG: dict[str, Case] = {
    "lost pose": (with_a_lost_pose, network, "gradient of parameter 0.weight is off by"),
    "normalization twice": (
        without_restoring,
        lambda: nn.Sequential(nn.Unflatten(0, (4, 1)), nn.BatchNorm1d(1), nn.Flatten(0), network()),
        "buffer 1.num_batches_tracked is 8 instead of 4",
    ),
    "hidden write to a buffer": (
        without_restoring,
        lambda: With(lambda model, pose: averaging(model.part, pose) * 0 + model.net(pose), part=average_part()),
        "buffer part.average differs by",
    ),
    "counter": (
        without_restoring,
        lambda: With(counting, calls=0, log={"seen": []}),
        "attribute calls is 8 instead of 4",
    ),
    "generator of numpy": (without_restoring, lambda: With(draws(np.random.rand)), "the generator of numpy.random"),
    "generator of Python": (without_restoring, lambda: With(draws(random.random)), "the generator of random"),
    "generator of torch": (
        without_restoring,
        lambda: With(draws(lambda: torch.rand(1))),
        "the generator of torch differs",
    ),
    "noise beside a large energy": (
        without_restoring,
        lambda: With(noisy),
        "gradient of parameter net.0.weight is off",
    ),
    "memoised in the pose": (without_fresh_containers, lambda: With(memoised), "parameter net.0.weight"),
    "weight rebound": (without_carrying_over, lambda: With(limited), "parameter net.0.weight differs by"),
    "leaf outside": (
        without_validation,
        lambda: With(learned_inputs),
        "gradient of leaf 0 outside the model, shape (4,) is off by",
    ),
    "side loss": (
        nothing_taken_out,
        lambda: With(with_balance, gate=nn.Linear(4, 1), balance=0.0),
        "parameter gate.",
    ),
    "nonlinear backward": (nothing_taken_out, lambda: With(hooked), "gradient of parameter net.0."),
}


def average_part() -> Any:
    part: Any = Average()
    part.net = network()
    return part


def balanced(prediction: gradhooks.MultiPosePrediction, model: Any) -> Tensor:
    model.balance, balance = 0.0, model.balance
    return 3 * prediction.combined.sum() + balance


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_silently_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_out, make_model, text = WRONG[name]
    monkeypatch.setattr(CONTEXT, "leaf", torch.ones(4, requires_grad=name == "leaf outside"))
    model, inputs = make_model(), poses()
    options: dict[str, Any] = {**WITHOUT_AUDIT, "loss": lambda prediction: 3 * prediction.combined.sum()}
    if name == "side loss":
        options["loss"] = balanced
    if name == "memoised in the pose":
        inputs = [{"x": pose} for pose in inputs]
        options["call"] = lambda model, pose: model(pose)
    if take_out is not nothing_taken_out and name != "leaf outside":
        cured = gradhooks.gradcheck(model, inputs, "boltzmann", **options)
        assert cured.passed, cured
    take_out(monkeypatch)
    result = gradhooks.gradcheck(model, inputs, "boltzmann", **options)
    assert not result.passed, result
    wrong = [row for row in result.rows if row.verdict == "WRONG"]
    assert wrong, result
    assert any(text in difference for row in wrong for difference in row.differences), str(result)
    assert result.rows[-1].passed, result  # it runs plainly
    assert text in str(result)
    assert "memory=1GiB" in str(result).rpartition("or use what is ok here")[2] or "generators=[" in str(result)
    assert CONTEXT.leaf.grad is None


FROZEN: dict[str, Callable[[], nn.Module]] = {
    "requires_grad_": lambda: network().requires_grad_(False),
    "TorchScript": lambda: torch.jit.freeze(torch.jit.script(network().eval())),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", FROZEN)
def test_what_has_no_gradient_does_not_pass(name: str) -> None:
    model = FROZEN[name]()
    result = gradhooks.gradcheck(model, poses())
    assert not result.passed
    assert "NOT CHECKED: no leaf has a gradient in the full graph" in str(result)
    assert not gradhooks.gradcheck(
        model, poses(), loss=lambda prediction: prediction.combined.sum() + CONTEXT.zero
    ).passed


class OwnError(RuntimeError):
    """An error of a model."""


def test_errors_of_an_accumulator_are_rows() -> None:
    context = torch.ones(4, requires_grad=True)
    context.grad = torch.ones(4)
    outside = gradhooks.gradcheck(network(), poses(), call=lambda model, pose: model(pose + context))
    assert [row.verdict for row in outside.rows] == ["refused"] * 4 + ["ok"]
    assert not outside.passed
    assert "store, stream, recompute, auto: refused: the prediction of pose 0 depends on a tensor" in str(outside)
    assert torch.equal(context.grad, torch.ones(4))

    def refuse(model: Any, pose: Tensor) -> Tensor:
        if type(model.net[0].weight) is nn.Parameter and not model.net[0].weight._backward_hooks:
            model.log.calls += 1
        if model.log.calls > 12:
            raise OwnError("too many calls")
        return model.net(pose)

    failing = gradhooks.gradcheck(With(refuse, log=Unwatched(calls=0)), poses(), "boltzmann", **WITHOUT_AUDIT)
    assert failing.rows[2].verdict == "failed"
    assert math.isinf(failing.errors["recompute"])
    assert "failed: OwnError: too many calls" in str(failing)

    def drifting(model: Any, pose: Tensor) -> Tensor:
        model.log.calls += 1
        return model.net(pose * model.log.calls)

    result = gradhooks.gradcheck(With(drifting, log=Unwatched(calls=0)), poses(), "boltzmann", **WITHOUT_AUDIT)
    assert not result.passed
    assert not result.second_run_agrees
    assert "ANOTHER prediction" in str(result)
    assert result.rows[1].passed


def test_what_differs_in_the_full_graph_itself_is_not_compared() -> None:
    clock = iter(range(10**6))

    def timed(model: Any, pose: Tensor) -> Tensor:
        model.seconds = next(clock)
        return model.net(pose)

    result = gradhooks.gradcheck(With(timed, seconds=0), poses())
    assert result.passed
    assert "not compared, since the full graph itself differs when it runs again: attribute seconds" in str(result)


def test_a_copy_must_be_possible_and_independent() -> None:
    locked = With(lambda model, pose: model.net(pose), lock=threading.Lock())
    with pytest.raises(TypeError, match=r"copy\.deepcopy fails at its attribute lock .*__deepcopy__"):
        gradhooks.gradcheck(locked, poses())
    shared = With(lambda model, pose: model.net(pose))
    shared.own_forward = lambda _, pose: shared.net(pose)
    with pytest.raises(TypeError, match=r"uses the parameter net\.\d\.\w+ of the original"):
        gradhooks.gradcheck(shared, poses())
    with pytest.raises(TypeError, match="not an iterator"):
        gradhooks.gradcheck(network(), iter(poses()))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        gradhooks.gradcheck(network(), poses(width=3))


def test_the_gradient_error_is_relative_to_the_gradient_and_at_least_to_a_part_of_the_largest() -> None:
    large, small = torch.full((4,), 50.0), torch.full((4,), 1e-9)
    floor = torch.finfo(torch.float32).eps ** 0.25
    assert gradient_error([large * 1.01, small], [large, small]) == pytest.approx(0.01, rel=1e-4)
    assert gradient_error([large, small * 2], [large, small]) == pytest.approx(2e-9 / (floor * 100), rel=1e-4)
    assert gradient_error([large, None], [large, small]) == math.inf
    assert gradient_error([large, small], [large, None]) == math.inf
    assert gradient_error([None, torch.zeros(2)], [None, torch.zeros(2)]) == 0
    assert gradient_error([large.to_sparse()], [large]) == math.inf
    nan = torch.tensor([1.0, math.nan])
    assert gradient_errors({"a": nan}, {"a": nan}) == {"a": 0}
    assert gradient_error([nan], [torch.ones(2)]) == math.inf


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_every_kind_of_content_is_compared(name: str) -> None:
    model = CHANGING[name]()
    before = read_contents(model)
    assert list(content_differences(read_contents(model), before, 1e-16)) == []
    model(torch.ones(4))
    assert list(content_differences(read_contents(model), before, 1e-16))


def test_notes_are_escaped_in_html() -> None:
    result = GradientCheck((CheckedAccumulator("<b>", 0.0),), ("<i>",))
    assert "<b>" not in result._repr_html_()
    assert "<i>" not in result._repr_html_()

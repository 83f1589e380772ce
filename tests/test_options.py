"""Options are validated when they are set, frozen in a group, and shown."""

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_reference import ACCUMULATORS_AND_PLAIN, options_of

import gradhooks
from gradhooks import options as options_module
from gradhooks.options import OPTION_NAMES, Options, OptionTypes, call_model

INVALID: list[tuple[str, Any, type[Exception], str]] = [
    ("memory", "2 XB", ValueError, "memory must be a number of bytes"),
    (
        "chunk_size",
        0,
        ValueError,
        "chunk_size must be at least 1, or None to take as many poses as fit in memory=, got 0",
    ),
    (
        "chunk_size",
        "all",
        ValueError,
        "chunk_size must be at least 1, or None to take as many poses as fit in memory=, got 'all'",
    ),
    ("chunk_size", 2.5, ValueError, "chunk_size must be at least 1"),
    ("chunk_size", True, ValueError, "chunk_size must be at least 1"),
    ("collate", 3, TypeError, "collate must be a function, got 3"),
    ("call", "forward", TypeError, "call must be a function, got 'forward'"),
    ("tolerance", 3, ValueError, r"tolerance must be in \[0, 1\), relative to the largest coefficient, got 3"),
    ("tolerance", -0.1, ValueError, "tolerance must be in"),
    ("nonfinite", "ignore", ValueError, "nonfinite must be one of propagate, raise, drop, got 'ignore'"),
    ("generators", [3], TypeError, "generators takes generators of torch, numpy or random"),
    ("audit", "first", TypeError, "audit must be True or False, got 'first'"),
    ("progress", 1, TypeError, "progress must be a bool or a function"),
]
VALID: dict[str, Any] = {
    "memory": "2GiB",
    "chunk_size": 3,
    "collate": torch.stack,
    "call": lambda model, pose: model(pose),
    "tolerance": 0.1,
    "nonfinite": "drop",
    "generators": (torch.Generator(),),
    "process_group": None,
    "audit": False,
    "progress": print,
}


def make_scorer(**options: Any) -> gradhooks.MultiPose[nn.Linear]:
    return gradhooks.MultiPose(nn.Linear(3, 1), "min", **options)


def identity(model: nn.Module, pose: Any) -> Any:
    return model(pose)


@pytest.mark.parametrize(("name", "value", "error", "message"), INVALID)
def test_an_invalid_option_is_refused_at_construction_and_on_assignment(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_scorer(**{name: value})
    scorer = make_scorer(**{name: VALID[name]})
    before = scorer.options
    with pytest.raises(error, match=message):
        setattr(scorer, name, value)
    assert scorer.options is before


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_an_option_is_an_attribute(name: str) -> None:
    scorer = make_scorer()
    setattr(scorer, name, VALID[name])
    assert getattr(scorer, name) == VALID[name]
    assert getattr(make_scorer(**{name: VALID[name]}), name) == VALID[name]
    with pytest.raises(FrozenInstanceError):
        setattr(scorer.options, name, None)


def test_every_option_has_a_type() -> None:
    assert set(OptionTypes.__annotations__) == set(OPTION_NAMES) == set(VALID)
    parameters = inspect.signature(gradhooks.MultiPose).parameters
    assert list(parameters) == ["model", "combination", "combination_options", "accumulator", *OPTION_NAMES]
    assert all(parameters[name].default == getattr(Options(), name) for name in OPTION_NAMES)


def test_an_unknown_option_is_refused_with_the_closest_one() -> None:
    for create in (
        lambda: gradhooks.multipose("min", chunk_sise=3),  # type: ignore[call-arg]
        lambda: gradhooks.MultiPose(nn.Linear(4, 1), chunk_sise=3),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError, match="no option 'chunk_sise'; did you mean 'chunk_size'"):
            create()
    with pytest.raises(
        TypeError,
        match=r"no option 'zzz'\. The options are accumulator, audit, call, chunk_size, collate, combination_options",
    ):
        gradhooks.MultiPose(nn.Linear(4, 1), zzz=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="MultiPose has no option 'chunks'"):
        gradhooks.MultiPose(nn.Linear(4, 1), chunks=2)  # type: ignore[call-arg]
    with pytest.raises(gradhooks.errors.PluginError, match="minn"):
        gradhooks.multipose("minn")(nn.Linear(4, 1))


def test_names_are_resolved_on_assignment() -> None:
    scorer = make_scorer()
    scorer.accumulator = "stream"
    scorer.combination = "max"
    assert isinstance(scorer.accumulator, gradhooks.accumulators.Stream)
    assert isinstance(scorer.combination, gradhooks.combinations.Max)
    for name, unknown in (("accumulator", "min"), ("combination", "stream")):
        before = getattr(scorer, name)
        with pytest.raises(gradhooks.errors.PluginError, match=f"unknown.*{unknown}"):
            setattr(scorer, name, unknown)
        assert getattr(scorer, name) is before


def test_a_combination_may_change_between_module_and_function() -> None:
    scorer = make_scorer()
    scorer.combination = lambda predictions: predictions.sum(0)
    assert scorer([torch.ones(3), torch.ones(3)]).combined.shape == (1,)
    assert [name for name, _ in scorer.named_children()] == ["model"]
    scorer.combination = "boltzmann"
    assert [name for name, _ in scorer.named_children()] == ["model", "combination"]


def test_an_option_that_the_accumulator_ignores_is_refused() -> None:
    accumulator, name = "store", "tolerance"
    message = f"the accumulator '{accumulator}' does not use {name}="
    with pytest.raises(ValueError, match=message):
        make_scorer(accumulator=accumulator, **{name: VALID[name]})
    scorer = make_scorer(accumulator=accumulator)
    with pytest.raises(ValueError, match=message):
        setattr(scorer, name, VALID[name])
    scorer = make_scorer(**{name: VALID[name]})
    with pytest.raises(ValueError, match=message):
        scorer.accumulator = accumulator


def test_a_group_keeps_the_options_with_which_it_started() -> None:
    def backwards(change: Callable[[Any], None] | None = None, **options: Any) -> int:
        minimum = gradhooks.combinations.Min(scale=1.0)
        scorer = gradhooks.MultiPose(nn.Linear(1, 1), minimum, accumulator="recompute", **options)
        nn.init.ones_(scorer.model.weight)
        prediction = scorer(torch.arange(4.0).unsqueeze(1))
        if change is not None:
            change(scorer)
        prediction.combined.sum().backward()
        return scorer.report.backwards

    # The coefficients of the last two poses are 0.14 and 0.05 of the largest: a tolerance of 0.2 skips them.
    assert backwards() == 4
    assert backwards(tolerance=0.2) == 2
    assert backwards(lambda scorer: setattr(scorer, "tolerance", 0.2)) == 4
    assert backwards(lambda scorer: setattr(scorer, "tolerance", None), tolerance=0.2) == 2


def test_copies_keep_the_options() -> None:
    options: dict[str, Any] = {"call": identity, "chunk_size": 2, "tolerance": 0.25, "memory": "1MiB"}
    scorer = gradhooks.MultiPose(nn.Linear(3, 1), accumulator="recompute", **options)
    for copied in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):  # noqa: S301  # our own
        assert (copied.call, copied.chunk_size, copied.tolerance) == (identity, 2, 0.25)
        assert (copied.accumulator.name, copied.memory) == ("recompute", "1MiB")
    assert make_scorer().call is call_model


def test_a_copied_model_draws_from_the_copied_generator() -> None:
    class Drawing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.generator = torch.Generator()

    model = Drawing()
    copied = copy.deepcopy(gradhooks.MultiPose(model, generators=[model.generator]))
    assert copied.generators == (copied.model.generator,)
    assert copied.model.generator is not model.generator


def test_print_shows_the_settings() -> None:
    printed = str(make_scorer(accumulator="recompute", memory="1GiB", chunk_size=2, tolerance=0.1))
    for text in ("accumulator=recompute", "memory='1GiB'", "chunk_size=2", "tolerance=0.1", "Min(scale=1000"):
        assert text in printed
    assert "combination=mean" in str(gradhooks.MultiPose(nn.Linear(3, 1), torch.mean))


def test_the_report_prints_in_lines() -> None:
    scorer = make_scorer()
    scorer(torch.randn(5, 3)).combined.sum().backward()
    lines = str(scorer.report).splitlines()
    assert [line.split()[0] for line in lines] == [
        "poses", "groups", "inputs", "plain", "chunks", "backwards", "recomputed", "skipped", "memory", "accumulator",
        "reason"
    ]  # fmt: skip
    assert scorer.report._repr_html_().startswith("<table>")


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_reason_is_never_empty(accumulator: str, outputs: int) -> None:
    scorer = gradhooks.MultiPose(nn.Linear(3, outputs), "min", **options_of(accumulator))
    scorer(torch.randn(5, 3))
    assert scorer.report.accumulator in {"store", "stream", "recompute", "none"}
    assert (scorer.report.accumulator == "none") == (accumulator == "plain")
    assert scorer.report.reason
    with torch.no_grad():
        scorer(torch.randn(5, 3))
    assert "no gradient is computed" in scorer.report.reason
    scorer.model.requires_grad_(False)
    scorer(torch.randn(5, 3))
    assert ("graphs of all poses fit" if accumulator == "plain" else "nothing requires grad") in scorer.report.reason


def test_progress_without_tqdm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tqdm, or pass a function"):
        make_scorer(progress=True)
    make_scorer(progress=print)


def test_a_model_finds_the_attributes_of_its_parameters() -> None:
    class Scaled(nn.Linear):
        def forward(self, pose: Tensor) -> Tensor:
            prediction: Tensor = super().forward(pose) * self.weight.scale  # type: ignore[operator]
            return prediction

    model = Scaled(3, 1)
    model.weight.scale = 2.0  # type: ignore[assignment]
    for accumulator in ("store", "stream", "recompute"):
        model.zero_grad()
        gradhooks.MultiPose(model, accumulator=accumulator)(torch.ones(4, 3)).combined.sum().backward()
        assert model.weight.grad is not None
        torch.testing.assert_close(model.weight.grad, torch.full((1, 3), 2.0))

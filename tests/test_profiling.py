"""compare, estimate_memory and gradcheck: correct for small models, which they leave unchanged."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradhooks
from gradhooks.profiling.comparison import compare_steps
from gradhooks.profiling.peak_memory import PeakMemory
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.profiling.training_steps import TrainingStep, full_graph_step, multipose_step, offloaded_step


class Wide(nn.Module):
    """A model whose graph needs more memory than its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, pose: Tensor) -> Tensor:
        return self.inner(self.norm(pose)).mean(0)


def random_poses(count: int) -> list[Tensor]:
    return [torch.randn(256, 16) for _ in range(count)]


def test_compare_shows_every_way_to_run_a_step_and_leaves_the_model_unchanged(tmp_path: Path) -> None:
    model, poses = Wide(), random_poses(6)
    for leaf in model.parameters():
        leaf.grad = torch.ones_like(leaf)
    before = torch.get_rng_state()
    result = gradhooks.compare(model, poses, "boltzmann", accumulators=["store", "stream"], repeats=1)
    names = ["full graph", "checkpoint per pose", "MultiPose, memory=1GiB", "MultiPose, memory=0 (stream)"]
    assert [row.name for row in result.rows] == [*names, "store", "stream"]
    assert [row.plain for row in result.rows] == [None, None, 6, 0, 0, 0]
    assert result.rows[0].time_ratio == 1
    assert all(row.gradient_error < 1e-5 for row in result.rows)
    assert result.rows[3].peak_bytes < 0.5 * result.rows[0].peak_bytes
    assert all(leaf.grad is not None and (leaf.grad == 1).all() for leaf in model.parameters())
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(before, torch.get_rng_state())
    assert "| checkpoint per pose " in str(result)
    assert "<td>checkpoint per pose " in result._repr_html_()
    result.save(tmp_path / "comparison.json")
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["name"] == "full graph"
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 1000


STACKED_ROWS = ["full graph", "full graph, batched", "checkpoint per pose", "checkpoint per chunk of 4"]


def forms_of_poses(stack: Tensor) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return poses and options: a stack, and a list that can be collated."""
    return {"stack": (stack, {}), "collated list": (list(stack), {"collate": torch.stack})}


@pytest.mark.parametrize("form", ["stack", "collated list"])
def test_compare_batches_of_groups(form: str) -> None:
    model, index = Wide().inner, torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 2])
    wrapped = nn.Sequential(model, nn.Flatten(1), nn.AvgPool1d(8))
    poses, options = forms_of_poses(torch.randn(10, 8, 16))[form]
    result = gradhooks.compare(wrapped, poses, "boltzmann", groups=index, repeats=1, budgets=["28KiB"], **options)
    assert [row.name for row in result.rows[:4]] == STACKED_ROWS
    assert [row.name.split(" (")[0] for row in result.rows[4:]] == [
        f"MultiPose, memory={memory}" for memory in ("1GiB", "28KiB", "0")
    ]
    assert result.rows[4].plain == 10
    assert result.rows[5].plain is not None
    assert 0 < result.rows[5].plain < 10
    assert max(row.gradient_error for row in result.rows) < 1e-5
    assert "10 poses in 3 groups; ratios to the full graph" in str(result)
    bundled = gradhooks.compare(wrapped, gradhooks.Groups(poses, index), "boltzmann", repeats=1, **options)
    assert (bundled.poses, bundled.groups) == (10, 3)
    assert max(row.gradient_error for row in bundled.rows) < 1e-5


def test_the_offloaded_step_gives_the_gradient_of_the_full_graph() -> None:
    for poses, options in forms_of_poses(torch.randn(5, 16)).values():
        batch = TrainingBatch(nn.Linear(16, 1), poses, "boltzmann", torch.tensor([0, 0, 1, 1, 1]), **options)
        result = compare_steps(batch, [full_graph_step(batch), offloaded_step(batch)], repeats=1)
        assert result.rows[1].name == "full graph on the host"
        assert result.rows[1].gradient_error < 1e-6


class Slowing(nn.Module):
    """Its predictions depend on how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(16, 1), 0

    def forward(self, pose: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(pose) / self.calls


def test_gradients_are_compared_in_the_steps_that_are_timed() -> None:
    batch = TrainingBatch(Slowing(), list(torch.randn(3, 16)), "boltzmann")
    right, calls = full_graph_step(batch), count()

    def forward() -> Any:
        prediction = right.forward()
        return prediction._replace(combined=prediction.combined * (2 if next(calls) == 4 else 1))

    wrong = TrainingStep("wrong once", forward, lambda: None)
    result = compare_steps(batch, [right, wrong, multipose_step(batch, memory=0)], repeats=3)
    assert [row.gradient_error for row in result.rows] == [0, pytest.approx(1), pytest.approx(0, abs=1e-6)]
    assert batch.model.calls == 0


def peaks_of(scorer: Any, poses: Any, groups: Any = None) -> dict[str, int]:
    """Return the peak of the last of two steps with each accumulator: `auto` may change after the first step."""
    peaks = {}
    for _ in range(2):
        scorer.zero_grad()
        with PeakMemory() as memory:
            scorer(poses, groups=groups).combined.sum().backward()
        peaks[scorer.report.accumulator] = memory.peak
    return peaks


@pytest.mark.parametrize("combination", ["mean", "min", "boltzmann"])
@pytest.mark.parametrize("accumulator", ["store", "stream", "recompute"])
@pytest.mark.parametrize("count", [4, 16])
def test_estimate_memory_predicts_the_peak_within_ten_percent(combination: str, accumulator: str, count: int) -> None:
    model, poses = Wide(), random_poses(count)
    estimate = gradhooks.estimate_memory(model, poses[:2], combination, count=count, accumulator=accumulator)
    options: Any = {} if accumulator == "store" else {"tolerance": 0}  # store skips no pose
    scorer = gradhooks.MultiPose(model, combination, accumulator=accumulator, **options)
    assert estimate.chosen.peak_bytes == pytest.approx(peaks_of(scorer, poses)[accumulator], rel=0.1)
    assert estimate.chosen.plan.accumulator == accumulator
    assert estimate.fits
    assert f" {accumulator} |" in str(estimate)
    assert f"{accumulator}</td>" in estimate._repr_html_()


@pytest.mark.parametrize("form", ["stack", "collated list", "list"])
@pytest.mark.parametrize("combination", ["mean", "min"])
def test_estimate_memory_predicts_every_budget(form: str, combination: str) -> None:
    model, stack = Wide().inner, torch.randn(24, 64, 16)
    poses, options = {**forms_of_poses(stack), "list": (list(stack), {})}[form]
    options = {**options, "call": lambda model, pose: model(pose).mean(-2), "tolerance": 0}
    assert len(gradhooks.estimate_memory(model, poses, combination, **options).rows) == 7
    budgets = [0, "30KiB", "120KiB", "480KiB", "2MiB"]
    estimate = gradhooks.estimate_memory(model, poses, combination, memory="600KiB", budgets=budgets, **options)
    assert estimate.chosen.memory == "600KiB"
    assert "| -> 600KiB |" in str(estimate)
    plain = [row.plan.plain for row in estimate.rows]
    assert plain == sorted(plain)
    assert 0 < estimate.chosen.plan.plain < 24
    assert estimate.rows[-1].plan.plain == 24
    for row in estimate.rows:
        scorer = gradhooks.MultiPose(model, combination, memory=row.memory, **options)
        assert row.peak_bytes == pytest.approx(peaks_of(scorer, poses)[row.plan.accumulator], rel=0.1)
        report = scorer.report
        assert (report.plain, report.chunks) == (row.plan.plain, row.plan.chunks)
        if report.accumulator == row.plan.accumulator:
            assert report.recomputed / 24 <= row.plan.rerun_share


def test_estimate_memory_of_groups() -> None:
    model, stack, index = Wide().inner, torch.randn(12, 64, 16), [0, 0, 1, 1, 1, 2]
    options: Any = {"call": lambda model, pose: model(pose).mean(-2)}
    estimate = gradhooks.estimate_memory(model, stack[:6], groups=index, count=12, **options)
    assert (estimate.poses, estimate.groups) == (12, 6)
    assert "12 poses in 6 groups" in str(estimate)
    # The sums of six groups do not fit in the least memory, and do in more.
    assert estimate.rows[0].plan.accumulator == "recompute"
    groups = torch.tensor([*index, *(3 + number for number in index)])
    for row in estimate.rows:
        scorer = gradhooks.MultiPose(model, memory=row.memory, **options)
        assert row.peak_bytes == pytest.approx(peaks_of(scorer, stack, groups)[row.plan.accumulator], rel=0.1)


@pytest.mark.parametrize("function", [gradhooks.compare, gradhooks.gradcheck])
def test_options_reach_the_accumulators_that_use_them(function: Any) -> None:
    assert function(Wide(), random_poses(2), "min", memory="1MiB", tolerance=0)
    with pytest.raises(TypeError, match="chunk_size"):
        function(Wide(), random_poses(2), "min", chunk_sise=1)
    with pytest.raises(ValueError, match="tolerance must be in"):
        function(Wide(), random_poses(2), "min", tolerance=2)


def test_a_combination_is_created_once_with_its_options() -> None:
    """Its parameters are random: each way to run the step must use the same ones."""
    arguments = (nn.Linear(16, 3), torch.randn(4, 16), "gated_attention")
    options: Any = {"combination_options": {"features": 3, "hidden": 4}}
    compared = gradhooks.compare(*arguments, **options, repeats=1)
    assert max(row.gradient_error for row in compared.rows) < 1e-5
    assert gradhooks.gradcheck(*arguments, **options)
    assert gradhooks.estimate_memory(*arguments, **options).chosen.plan.plain == 4
    for function in (gradhooks.compare, gradhooks.gradcheck, gradhooks.estimate_memory):
        with pytest.raises(gradhooks.errors.PluginError, match=r"no option 'hiden'; did you mean 'hidden'\?"):
            function(*arguments, combination_options={"features": 3, "hiden": 4})


def test_an_option_that_every_accumulator_ignores_is_refused() -> None:
    with pytest.raises(ValueError, match="'store' does not use tolerance="):
        gradhooks.compare(Wide(), random_poses(2), "min", accumulators=["store"], tolerance=0.1)


def test_compare_accepts_accumulator_objects_and_options() -> None:
    model, store = nn.Linear(16, 1), gradhooks.accumulators.Store()
    result = gradhooks.compare(model, torch.randn(4, 16), accumulators=["recompute", store], repeats=1, chunk_size=2)
    assert [row.name for row in result.rows[3:]] == [
        "checkpoint per chunk of 2",
        "MultiPose, memory=1GiB",
        "MultiPose, memory=0 (stream)",
        "recompute",
        "store",
    ]
    assert [row.backwards for row in result.rows] == [None, None, None, None, 4, 4, 4, 4]
    with pytest.raises(gradhooks.errors.PosesError, match="collate="):
        gradhooks.compare(model, list(torch.randn(4, 16)), chunk_size=2)

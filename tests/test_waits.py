"""How often a batch waits for the device: at most four times, whatever the numbers of poses, chunks and groups are.

These tests count on the device that is written in Python, which `test_python_device.py` starts.
"""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import python_device
import torch
from chosen_device import DEVICE
from plugin_combinations import AttentionPooling
from torch import Tensor, nn
from training_reference import case_label

import gradhooks
from gradhooks.accumulators.recompute import RecomputeAccumulation
from gradhooks.testing import full_graph

pytestmark = pytest.mark.skipif(DEVICE.type != python_device.NAME, reason="needs the device written in Python")

COMBINATIONS: dict[str, Any] = {
    "mean": gradhooks.combinations.Mean,
    "min": gradhooks.combinations.Min,
    "max": lambda: gradhooks.combinations.Max(scale=1.0),
    "boltzmann": gradhooks.combinations.Boltzmann,
    "attention": AttentionPooling,
    "none": lambda: None,
}
MODES: dict[str, dict[str, Any]] = {
    **{name: {"accumulator": name, "memory": 0} for name in ("stream", "store", "recompute", "auto")},
    "default": {},
    "auto in chunks": {"memory": 0, "chunk_size": 4},
    "stream in chunks": {"accumulator": "stream", "memory": 0, "chunk_size": 4},
}
FEW_SIZES = [(3, 1), (8, 1), (8, 2)]
ALL_SIZES = [(8, 1), (8, 8), (64, 1), (64, 8)]


def small_model(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).to(dtype)


class Training:
    """A model on the device with its poses, in groups in turn.

    Args:
        model: The model.
        combination: The combination.
        size: The numbers of poses and of groups.
        options: Those of `MultiPose`.
    """

    def __init__(self, model: nn.Module, combination: Any, size: tuple[int, int], **options: Any) -> None:
        self.model, (self.count, groups) = model.to(DEVICE), size
        self.combination = combination
        if isinstance(combination, nn.Module):
            combination.to(DEVICE, next(model.parameters()).dtype)
        self.scorer = gradhooks.MultiPose(model, combination, **options)
        self.poses = torch.linspace(-1, 1, 3 * self.count, dtype=next(model.parameters()).dtype).view(-1, 3).to(DEVICE)
        self.groups = None if groups == 1 else [pose % groups for pose in range(self.count)]

    def step(self, **arguments: Any) -> None:
        prediction = self.scorer(self.poses, groups=self.groups, **arguments)
        (prediction.combined - 0.3).square().sum().backward()

    def waits(self, **arguments: Any) -> python_device.WaitCount:
        """Return the waits of the third step: a mode of the model is examined in the first, `auto` learns from it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gradhooks.errors.GradhooksWarning)
            self.step(**arguments)
            self.step(**arguments)
            self.model.zero_grad()
            with python_device.count_waits() as count:
                self.step(**arguments)
        return count


def _unchanged(predictions: Tensor) -> Tensor:
    return predictions


def expected_gradients(training: Training) -> list[Tensor]:
    """Return the gradients of the full graph on the CPU."""
    model, combination = training.model.cpu(), training.combination
    model.zero_grad()
    rows: Any = training.poses.cpu()
    if isinstance(combination, nn.Module):
        combination.cpu()
    groups = [0] * training.count if training.groups is None else training.groups
    for group in sorted(set(groups)):
        members = [pose for pose, number in zip(rows, groups, strict=True) if number == group]
        prediction = full_graph(model, members, combination or _unchanged, call=lambda model, pose: model(pose[None]))
        combined = prediction.per_pose if combination is None else prediction.combined
        (combined - 0.3).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_few_waits(combination: str, mode: str, sizes: list[tuple[int, int]]) -> None:
    totals = {}
    for size in sizes:
        with case_label(combination, mode, size):
            training = Training(small_model(), COMBINATIONS[combination](), size, **MODES[mode])
            count = training.waits()
            assert count.total <= 4, str(count)
            totals[size] = count.total
            gradients = [
                parameter.grad.cpu() for parameter in training.model.parameters() if parameter.grad is not None
            ]
            for gradient, expected in zip(gradients, expected_gradients(training), strict=True):
                torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    most_with_groups = {total for (_, groups), total in totals.items() if groups > 1}
    most_without = {total for (_, groups), total in totals.items() if groups == 1}
    # `auto` may choose another accumulator for one group than for several.
    assert len(most_with_groups) <= 1, totals
    assert len(most_without) <= 1, totals
    assert mode.startswith("auto") or len(set(totals.values())) == 1, totals


@pytest.mark.parametrize("mode", ["stream", "recompute", "auto", "auto in chunks", "default"])
def test_few_waits(mode: str) -> None:
    for combination in COMBINATIONS if mode in {"recompute", "default"} else ["min", "boltzmann"]:
        assert_few_waits(combination, mode, FEW_SIZES)


@pytest.mark.long
@pytest.mark.parametrize(("combination", "mode"), [*itertools.product(COMBINATIONS, MODES)])
def test_few_waits_of_all_sizes(combination: str, mode: str) -> None:
    assert_few_waits(combination, mode, ALL_SIZES)


def test_other_options_wait_once_more() -> None:
    for accumulator, options, dtype in [
        ("recompute", {"nonfinite": "drop"}, torch.float64),
        ("auto", {"nonfinite": "raise"}, torch.float64),
        ("stream", {}, torch.float16),
        ("store", {}, torch.float16),
    ]:
        plain, other = (
            [
                Training(small_model(dtype=kind), "min", size, accumulator=accumulator, memory=0, **more).waits()
                for size in ((3, 1), (8, 2))
            ]
            for kind, more in ((torch.float64, {}), (dtype, options))
        )
        for before, after in zip(plain, other, strict=True):
            assert after.total <= before.total + 1, f"{accumulator} {options} {dtype}: {before}\n{after}"


def test_groups_with_weights_in_float16_wait_four_times() -> None:
    cases = [("stream", "propagate", 4), ("auto", "propagate", 4), ("auto", "drop", 5), ("default", "propagate", 4)]
    for mode, nonfinite, most in cases:
        training = Training(small_model(dtype=torch.float16), "min", (8, 2), **MODES[mode], nonfinite=nonfinite)
        count = training.waits(weights=torch.rand(8) + 0.1)
        assert count.total <= most, f"{mode} {nonfinite}: {count}"


def test_weights_of_the_host_are_moved_once() -> None:
    for size in ((3, 1), (8, 2)):
        training = Training(small_model(), "boltzmann", size, accumulator="stream", memory=0)
        count = training.waits(weights=torch.rand(size[0]) + 0.1)  # in float32, unlike all else
        assert count.copies_from_host[torch.float32] == 1, count.copies_from_host
        assert count.total <= 4, str(count)


def test_state_of_the_model_is_compared_without_a_wait_for_each_layer() -> None:
    layers = [nn.BatchNorm1d(4), nn.Dropout(0.3), nn.BatchNorm1d(4)]
    for accumulator in ("stream", "recompute", "auto"):
        counts = {
            count: Training(
                small_model(*layers), "boltzmann", (count, 1), accumulator=accumulator, memory=0, chunk_size=4
            ).waits()
            for count in (8, 16)
        }
        assert counts[8].total == counts[16].total <= 4, f"{accumulator}: {counts[8]}\n{counts[16]}"


@contextmanager
def error_at_a_wait() -> Iterator[None]:
    module = torch.get_device_module(DEVICE)
    module.set_sync_debug_mode("error")
    try:
        yield
    finally:
        module.set_sync_debug_mode("default")


def test_chunks_and_plain_poses_run_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for accumulator, combination in itertools.product(("stream", "store", "recompute"), ("min", None)):
        training = Training(small_model(), combination, (8, 2), accumulator=accumulator, memory=0, chunk_size=3)
        training.step()
        with error_at_a_wait():
            combined = training.scorer(training.poses, groups=training.groups).combined
        combined.sum().backward()
    plain = Training(small_model(), "boltzmann", (8, 2))
    plain.step()
    with error_at_a_wait():
        plain.step()
    add = RecomputeAccumulation.add
    waiting = Training(small_model(), "min", (8, 1), accumulator="recompute", memory=0)
    waiting.step()
    monkeypatch.setattr(RecomputeAccumulation, "add", lambda *chunk: (chunk[-1].sum().item(), add(*chunk)))
    with error_at_a_wait(), pytest.raises(RuntimeError, match=r"synchronizing operation: local_scalar_dense in"):
        waiting.step()


def test_a_wait_by_hand_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(small_model(), "min", (8, 1), accumulator="recompute", memory=0)
    before = training.waits()
    add = RecomputeAccumulation.add

    def waiting(self: RecomputeAccumulation, chunk: Any, predictions: Tensor) -> None:
        predictions.sum().item()
        add(self, chunk, predictions)

    monkeypatch.setattr(RecomputeAccumulation, "add", waiting)
    after = training.waits()
    assert after.total == before.total + 8
    assert after.operators["local_scalar_dense"] == 8

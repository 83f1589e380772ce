"""Batches on the device written in Python: its memory, its random numbers, autocast, and tensors of two devices.

`test_python_device.py` starts these tests, on that device.
"""

import gc
from typing import Any

import pytest
import python_device
import torch
from chosen_device import DEVICE
from python_device import MEMORY
from torch import Tensor, nn

import gradhooks
from gradhooks.engine.memory_budget import memory_in_bytes
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.testing import full_graph

pytestmark = pytest.mark.skipif(DEVICE.type != python_device.NAME, reason="needs the device written in Python")


@pytest.fixture
def _limit_is_lifted() -> Any:
    yield
    MEMORY.limit = None


def wide_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1), nn.Flatten(0)
    ).double()


def deep_model() -> nn.Sequential:
    """Return a model whose graphs are larger than its gradients."""
    torch.manual_seed(0)
    hidden = [nn.Tanh() for _ in range(8)]
    return nn.Sequential(nn.Linear(8, 64), *hidden, nn.Linear(64, 1), nn.Flatten(0)).double()


def poses(count: int) -> Tensor:
    return torch.randn(count, 8, dtype=torch.float64)


def step(scorer: Any, rows: Any, groups: Any = None) -> None:
    (scorer(rows, groups=groups).combined - 0.3).square().sum().backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]


def test_tensors_of_two_devices_are_refused() -> None:
    own, of_host = torch.ones(3, device=DEVICE), torch.ones(3)
    for operation in (
        lambda: own + of_host,
        lambda: torch.cat([own, of_host]),
        lambda: torch._foreach_add([own], [of_host]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            operation()
    assert (own + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert own[of_host.long()].tolist() == [1, 1, 1]


def test_random_numbers_of_the_device_are_its_own() -> None:
    torch.manual_seed(4)
    on_host = torch.rand(3)
    drawn = torch.rand(3, device=DEVICE)
    assert torch.equal(drawn.cpu(), on_host)  # from the same seed, by a generator of its own
    state = torch.get_device_module(DEVICE).get_rng_state()
    again = torch.rand(3, device=DEVICE)
    torch.get_device_module(DEVICE).set_rng_state(state)
    assert torch.equal(torch.rand(3, device=DEVICE), again)


def test_bfloat16_autocast_of_the_device() -> None:
    results = []
    for accumulator in (None, "recompute", "stream"):
        model, rows = wide_model().float().to(DEVICE), poses(4).float().to(DEVICE)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert model(rows).dtype == torch.bfloat16
            if accumulator is None:
                prediction = full_graph(
                    model, list(rows), gradhooks.combinations.Mean(), call=lambda model, pose: model(pose[None])
                )
            else:
                prediction = gradhooks.MultiPose(model, "mean", accumulator=accumulator, memory=0)(rows)
        prediction.combined.square().sum().backward()
        results.append(gradients(model))
    for result in results[1:]:
        for gradient, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=1e-3)


def test_the_default_device_is_that_of_the_forward_in_the_second_run() -> None:
    model, rows = wide_model().to(DEVICE), poses(4).to(DEVICE)

    def call(model: nn.Module, pose: Tensor) -> Tensor:
        return model(pose[None] * torch.rand(8, dtype=torch.float64))  # made on the default device

    with DEVICE:
        step(gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", memory=0, call=call), list(rows))
    assert len(gradients(model)) == 6


@pytest.mark.usefixtures("_limit_is_lifted")
def test_a_batch_fits_below_the_limit_of_the_device() -> None:
    rows, count = poses(48), 48
    groups = [pose % 3 for pose in range(count)]
    reference = deep_model()
    step(gradhooks.MultiPose(reference, "boltzmann"), rows, groups)
    model, rows = deep_model().to(DEVICE), rows.to(DEVICE)
    scorer = gradhooks.MultiPose(model, "boltzmann")
    needed = peak_bytes(lambda: step(scorer, rows, groups), DEVICE)
    assert scorer.report.plain == count
    model.zero_grad()
    MEMORY.limit = MEMORY.live + needed // 4
    MEMORY.reset_peak()
    scorer = gradhooks.MultiPose(model, "boltzmann")
    for _ in range(2):
        model.zero_grad()
        step(scorer, rows, groups)
        assert scorer.report.chunks > 1
        assert MEMORY.peak <= MEMORY.limit
    for gradient, expected in zip(gradients(model), gradients(reference), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    MEMORY.limit = MEMORY.live + 100
    with pytest.raises(torch.OutOfMemoryError, match="exceed"):
        step(scorer, rows, groups)


@pytest.mark.usefixtures("_limit_is_lifted")
def test_a_fraction_is_of_the_free_memory_of_the_device() -> None:
    MEMORY.limit = MEMORY.live + 1_000_000
    assert memory_in_bytes(0.25, DEVICE) == 250_000
    model = wide_model().to(DEVICE)
    scorer = gradhooks.MultiPose(model, memory=0.5)
    free = MEMORY.limit - MEMORY.live
    rows = poses(2).to(DEVICE)
    step(scorer, rows)
    assert scorer.report.memory.allowed == pytest.approx(free / 2, rel=0.02)


@pytest.mark.parametrize(
    ("accumulator", "combination"), [("auto", "mean"), ("recompute", "mean"), ("stream", "boltzmann")]
)
def test_the_estimate_is_the_peak_of_the_device(accumulator: str, combination: str) -> None:
    model, rows = wide_model().to(DEVICE), poses(8).to(DEVICE)
    budgets = [0, 30_000, "1GiB"]
    estimate = gradhooks.estimate_memory(model, rows, combination, accumulator=accumulator, budgets=budgets)
    for row in estimate.rows:
        scorer = gradhooks.MultiPose(model, combination, accumulator=accumulator, memory=row.memory)
        step(scorer, rows)
        model.zero_grad()
        measured = peak_bytes(lambda scorer=scorer: step(scorer, rows), DEVICE)
        assert measured == pytest.approx(row.peak_bytes, rel=0.05), (row, scorer.report)


def test_nothing_is_left_on_the_device() -> None:
    for accumulator in ("stream", "store", "recompute", "auto"):
        rows = poses(6).to(DEVICE)
        scorer = gradhooks.MultiPose(wide_model().to(DEVICE), "boltzmann", accumulator=accumulator, memory=0)
        step(scorer, rows)
        step(scorer, rows)
        gc.collect()
        live = MEMORY.live
        for _ in range(3):
            step(scorer, rows)
        assert MEMORY.live <= live

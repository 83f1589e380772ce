"""A second run that differs is measured against the spread of the predictions."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradhooks
from gradhooks.engine.drift import refuse_drift, spread
from gradhooks.engine.prediction_digest import DigestCheck, PredictionDigest, first_run_of, tensors_to_compare
from gradhooks.errors import ReplayError


def context_of(first: Tensor, dtypes: Any = ()) -> Any:
    return SimpleNamespace(
        poses=range(len(first)), batch=SimpleNamespace(autocast=SimpleNamespace(dtypes=list(dtypes)))
    )


def drifts(first: Tensor, second: Tensor, *, packed: bool = False, dtypes: Any = ()) -> bool:
    try:
        refuse_drift(context_of(first, dtypes), torch.arange(len(first)), second, first, packed=packed)
    except ReplayError:
        return True
    return False


def digest_drifts(first: Tensor, second: Tensor, *, packed: bool = False, dtypes: Any = ()) -> list[int]:
    """Return the pose that a digest finds to differ, if there is one."""
    saved = tensors_to_compare(first)
    assert sum(tensor.nbytes for tensor in saved) < first.nbytes / 4
    digest = first_run_of(saved)
    assert isinstance(digest, PredictionDigest)
    check = DigestCheck(context_of(first, dtypes), digest, packed=packed)
    check.add(slice(20, len(first)), second[20:])  # last to first, in other blocks than the digest
    check.add(list(range(20)), second[:20])
    try:
        check.refuse()
    except ReplayError as error:
        return [int(str(error).split()[1])]
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [0.0, -3000.0])
def test_other_random_numbers_are_drift_and_rounding_is_not(size: float, packed: bool, dtype: torch.dtype) -> None:
    first = size + torch.randn(8, 3, dtype=dtype)
    rounding = torch.finfo(dtype).eps * first.abs() * torch.randn_like(first).sign()
    assert not drifts(first, first.clone(), packed=packed)
    assert not drifts(first, first + 4 * rounding, packed=packed)
    one_pose_differs = first.clone()
    one_pose_differs[5, 1] += 0.05
    assert drifts(first, one_pose_differs, packed=packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [0.0, -3000.0])
def test_large_predictions_are_compared_by_their_digest(size: float, packed: bool, dtype: torch.dtype) -> None:
    scales = torch.logspace(-3, 1, 300).to(dtype)
    first = (size + 10 * torch.randn(64, 300).to(dtype)) * scales
    rounding = torch.finfo(dtype).eps * first.abs() * torch.randn(first.shape).sign()
    assert not digest_drifts(first, first.clone(), packed=packed)
    assert not digest_drifts(first, first + 4 * rounding, packed=packed)
    if dtype is not torch.bfloat16 or size == 0:
        other = first.clone()
        other[25] = (size + 10 * torch.randn(300).to(dtype)) * scales
        assert digest_drifts(first, other, packed=packed) == [25]
        first[25] = torch.nan  # nothing is known of it
        assert not digest_drifts(first, other, packed=packed)
        assert digest_drifts(other, first, packed=packed) == [25]
    assert not digest_drifts(torch.zeros_like(first), torch.zeros_like(first), packed=packed)


@pytest.mark.parametrize("first", [torch.tensor([-3000.0]), torch.full((4,), -3000.0)], ids=["one pose", "equal poses"])
def test_without_spread_the_size_counts(first: Tensor) -> None:
    assert not drifts(first, first * (1 + 1e-6))
    assert drifts(first, first + 0.1)


def test_each_component_has_its_own_spread() -> None:
    first = torch.stack([1000 * torch.randn(6, dtype=torch.float64), 1e-3 * torch.randn(6, dtype=torch.float64)], 1)
    second = first.clone()
    second[2, 1] += 1e-6  # much for the second, nothing for the first
    assert drifts(first, second)
    second = first.clone()
    second[2, 0] += 1e-6
    assert not drifts(first, second)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_second_run_that_is_not_finite_is_drift(value: float) -> None:
    first = torch.randn(4)
    second = first.clone()
    second[1] = value
    assert drifts(first, second)
    assert not drifts(second, second)
    assert not drifts(second, first)  # nothing is known of the first


def test_the_spread_is_that_of_the_finite_predictions() -> None:
    predictions = torch.tensor([[1.0, torch.nan], [3.0, torch.inf], [-torch.inf, torch.nan]])
    assert torch.equal(spread(predictions), torch.tensor([2.0, 0.0]))


def test_packed_poses_in_a_coarse_dtype_may_differ_more() -> None:
    first = torch.randn(8)
    second = first + 5e-3
    assert drifts(first, second)
    assert not drifts(first, second, packed=True, dtypes=[torch.bfloat16])


class TotalEnergy(nn.Module):
    """Drops features by Python's generator, which it hides in a function; predicts a total energy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.draw = random.Random(0).random  # noqa: S311

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose * (self.draw() < 0.5)) - 3000


def test_random_numbers_below_a_large_constant_are_found() -> None:
    combined, _ = gradhooks.MultiPose(TotalEnergy(), "mean", accumulator="recompute", audit=False)(
        list(torch.randn(6, 4))
    )
    with pytest.raises(ReplayError, match=r"pose \d of 6: its second run differs from its first by"):
        combined.sum().backward()

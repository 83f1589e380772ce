"""The numbers of the accumulators "stream" and "auto": online softmax, the fit of each group, shares of poses."""

import math

import pytest
import torch
from torch import Tensor

from gradhooks.accumulators.auto import Auto
from gradhooks.accumulators.declared_fit import fit_groups
from gradhooks.accumulators.declared_weights import DeclaredWeights
from gradhooks.accumulators.online_softmax import Declaration, OnlineSoftmax
from gradhooks.accumulators.pose_shares import NEWEST_SHARE, PoseShares, observe, observe_plain
from gradhooks.accumulators.stream_chunks import StreamChunks
from gradhooks.engine.accumulation import Coefficients

ROUNDING = 2.0**-53

WEIGHTED = DeclaredWeights(1, torch.zeros(1))
"""A declaration of one log-weight."""


def softmax_of(
    log_weights: Tensor, features: Tensor, groups: list[int], chunk_size: int, threshold: float = ROUNDING
) -> tuple[OnlineSoftmax, Tensor]:
    """Return the softmax of all poses, and `sum_i factor_i value_i` of each group with random values, rescaled."""
    count, columns = features.shape
    values = torch.arange(1.0, count + 1, dtype=torch.float64)
    softmax = OnlineSoftmax(columns, threshold, max(groups) + 1)
    sums = torch.zeros(max(groups) + 1, 1 + columns, dtype=torch.float64)
    for start in range(0, count, chunk_size):
        rows = slice(start, start + chunk_size)
        declaration = Declaration(log_weights[rows].tolist(), features[rows].tolist())
        rescalings, factors = softmax.update(declaration, groups[rows])
        for group, factor, shifts in rescalings:
            sums[group, 1:] += torch.tensor(shifts, dtype=torch.float64) * sums[group, 0]
            sums[group] *= factor
        for group, row, value in zip(groups[rows], factors, values[rows], strict=True):
            sums[group] += value * torch.tensor(row, dtype=torch.float64)
    return softmax, sums


@pytest.mark.parametrize("chunk_size", [1, 4, 50])
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
@pytest.mark.parametrize("extent", [1.0, 100.0])
def test_the_sums_are_those_of_the_final_factors(extent: float, order: str, chunk_size: int) -> None:
    log_weights = extent * torch.randn(50, dtype=torch.float64)
    if order != "random":
        log_weights = log_weights.sort(descending=order == "falling").values
    features = torch.randn(50, 2, dtype=torch.float64)
    groups = [index * index % 3 for index in range(50)]
    softmax, sums = softmax_of(log_weights, features, groups, chunk_size)
    factors = softmax.factors()
    expected = torch.zeros_like(sums).index_add(
        0, torch.tensor(groups), factors * torch.arange(1.0, 51, dtype=torch.float64).unsqueeze(1)
    )
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    for group in set(groups):
        own = torch.tensor(groups) == group
        top = log_weights[own].argmax()
        weights = (log_weights[own] - log_weights[own].max()).exp()
        centred = features[own] - features[own][top]
        rows = torch.cat([weights.unsqueeze(1), weights.unsqueeze(1) * centred], 1)
        # What was dropped is lost in rounding beside the rest.
        torch.testing.assert_close(factors[own], rows, rtol=1e-12, atol=50 * ROUNDING)
    assert softmax.largest_exponent == log_weights.abs().max()


def test_poses_below_the_threshold_do_not_count() -> None:
    log_weights = torch.tensor([0.0, -10.0, -50.0, 60.0, 59.0], dtype=torch.float64)
    softmax, sums = softmax_of(log_weights, torch.zeros(5, 0), [0, 0, 0, 0, 0], 1)
    assert softmax.factors().squeeze(1).tolist() == [0.0, 0.0, 0.0, 1.0, math.exp(-1.0)]
    assert sums.item() == pytest.approx(4 + 5 * math.exp(-1), rel=1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_declarations_that_are_not_finite_get_the_factor_zero(value: float) -> None:
    log_weights = torch.tensor([0.0, value, 1.0], dtype=torch.float64)
    features = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    softmax, sums = softmax_of(log_weights, features, [0, 0, 0], 1)
    assert softmax.factors()[1].tolist() == [0.0, 0.0]
    assert sums.isfinite().all()
    features[2] = value  # the largest log-weight is not taken as a reference
    softmax, sums = softmax_of(log_weights.nan_to_num(-1, -1, -1), features, [0, 0, 0], 1)
    assert softmax.factors()[2].tolist() == [0.0, 0.0]
    assert softmax.factors()[0].tolist() == [1.0, 0.0]
    assert sums.isfinite().all()


# -- the fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_the_fit_is_the_least_squares_solution_of_each_group(columns: int) -> None:
    counts = [1, 2, 3, 4, 5, 9, 30, 0, 17]
    groups = torch.cat([torch.full((count,), group) for group, count in enumerate(counts)])
    groups = groups[torch.randperm(len(groups))]
    scale = torch.tensor([1.0, 1e-8, 1e6], dtype=torch.float64)[:columns]
    factors = scale * torch.randn(len(groups), columns, dtype=torch.float64)
    coefficients = torch.randn(len(groups), dtype=torch.float64)
    fit = fit_groups(factors, coefficients, groups, len(counts))
    for group, count in enumerate(counts):
        own = groups == group
        if count == 0:
            assert fit.numbers[group].tolist() == [0.0] * columns
            continue
        scaled = factors[own] / factors[own].abs().amax(0)
        solution = torch.linalg.lstsq(scaled, coefficients[own].unsqueeze(1), driver="gelsd").solution
        expected = coefficients[own] - (scaled @ solution).squeeze(1)
        torch.testing.assert_close(fit.left[own], expected, rtol=1e-9, atol=1e-9)
        products = (factors[own] * fit.numbers[group]).abs().sum(1)
        torch.testing.assert_close(fit.terms[own], coefficients[own].abs() + products)
    assert fit.fitted.all()


def test_the_fit_of_many_equal_coefficients_leaves_less_than_the_last_bit() -> None:
    count = 100_000
    coefficients = torch.full((count,), 1 / count, dtype=torch.float64) * (1 + 1e-16)
    fit = fit_groups(torch.ones(count, 1, dtype=torch.float64), coefficients, torch.zeros(count, dtype=torch.long), 1)
    assert fit.left.abs().max() <= torch.finfo(torch.float64).eps / count


@pytest.mark.parametrize("columns", [1, 2])
def test_a_group_with_a_coefficient_that_is_not_finite_is_not_fitted(columns: int) -> None:
    factors = torch.ones(4, columns, dtype=torch.float64)
    coefficients = torch.tensor([1.0, math.inf, 1.0, math.nan], dtype=torch.float64)
    fit = fit_groups(factors, coefficients, torch.tensor([0, 1, 0, 2]), 3)
    assert fit.fitted.tolist() == [True, False, True, False]
    assert fit.numbers[1:].count_nonzero() == 0
    torch.testing.assert_close(fit.left, torch.tensor([0.0, math.inf, 0.0, math.nan]).double(), equal_nan=True)


# -- the shares of poses --------------------------------------------------------------------------------------------


def coefficients_of(*values: float, direct: Tensor | None = None) -> Coefficients:
    return Coefficients(torch.tensor(values).unsqueeze(1), direct)


def test_shares_of_a_batch() -> None:
    shares = PoseShares()
    shares.learn([])
    assert shares == PoseShares()
    direct = torch.tensor([[0.0], [1e-30], [0.0], [0.0]])
    log_weights = torch.tensor([0.0, -50.0, 3.0, -60.0])
    shares.learn([observe(coefficients_of(1.0, 1e-9, 0.0, -2.0, direct=direct), 1e-6, log_weights, [0, 0, 1, 2])])
    assert (shares.significant, shares.significant_online, shares.read_directly) == (0.5, 0.75, 0.25)
    shares.learn([observe(coefficients_of(1.0, 1.0), 1e-6, None, None)])
    assert shares.significant == pytest.approx(0.5 + 0.5 * NEWEST_SHARE)
    assert shares.read_directly == pytest.approx(0.25 * (1 - NEWEST_SHARE))
    assert shares.significant_online == 0.75
    assert shares.batches == 2
    shares.learn([observe_plain(torch.zeros(3))])
    assert shares.read_directly == pytest.approx(0.25 * (1 - NEWEST_SHARE))  # of plain poses it is not known
    assert shares.significant == pytest.approx((0.5 + 0.5 * NEWEST_SHARE) * (1 - NEWEST_SHARE))


def test_parts_of_a_batch_are_compared_with_its_largest_coefficient() -> None:
    shares = PoseShares()
    shares.learn([observe_plain(torch.tensor([1e-12, 2e-12])), observe(coefficients_of(1.0, 0.0), 1e-6, None, None)])
    assert shares.significant == 0.25
    shares = PoseShares()
    part = Coefficients(torch.tensor([1e-12, 1.0, math.nan]), None, torch.tensor(1e9))
    shares.learn([observe(part, 1e-6, None, None)])
    assert shares.significant == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("shares", "uniform", "backwards", "streams"),
    [
        (PoseShares(batches=0), True, 1.0, True),
        (PoseShares(batches=0), False, 1.0, False),
        (PoseShares(0.9, 0.5, 0.0, 1), False, 1.0, True),  # 0.62 against 1.15
        (PoseShares(0.9, 0.5, 0.0, 1), False, 2.2, False),  # 1.08 against 1.15, which is not clear
        (PoseShares(1.0, 0.1, 0.0, 1), True, 1.0, True),  # 1 against 1.25, whatever the log-weights of others were
        (PoseShares(1.0, 0.1, 0.0, 1), True, 1.5, False),
        (PoseShares(0.1, 0.1, 0.5, 1), False, 1.0, False),  # 0.82 against 0.75
        (PoseShares(0.1, 0.0, 0.5, 1), False, 1.0, False),  # 0.75 against 0.75, which is not clear
        (PoseShares(0.3, 0.0, 0.0, 1), False, 1.0, True),
        (PoseShares(0.0, 0.0, 0.9, 1), False, 1.0, False),
    ],
)
def test_auto_compares_the_costs(shares: PoseShares, uniform: bool, backwards: float, streams: bool) -> None:
    auto = Auto()
    auto._shares = shares
    auto._decide(DeclaredWeights(1) if uniform else WEIGHTED, backwards)
    assert auto._streams == streams


@pytest.mark.parametrize(
    ("groups", "fixed", "size", "sums", "expected"),
    [
        (None, False, 1, 2, (1.0, [6, 3])),
        (None, False, 3, 1, (1.0, [6, 3])),
        (None, True, 3, 2, (2.0, [None, None])),
        ([0, 1, 2, 0, 1, 2], False, 3, 2, (3.0, [None, None])),
        ([0, 0, 1, 1, 1, 1], True, 3, 2, (2.5, [None, None])),
        ([0, 0, 1, 1, 1, 1], True, 3, 1, (1.5, [None, None])),
        ([0, 0, 1, 1, 1, 1], False, 3, 1, (1.0, [2, 3])),
        ([0, 0, 1, 1, 1, 1], False, 3, 2, (2.0, [2, 3])),
    ],
)
def test_chunks_of_a_stream(
    groups: list[int] | None, fixed: bool, size: int, sums: int, expected: tuple[float, list[int | None]]
) -> None:
    chunks = StreamChunks(groups, 6, fixed=fixed)
    assert (chunks.backwards(size, sums), [chunks.longest(start) for start in (0, 3)]) == expected


def test_auto_keeps_a_choice_that_costs_as_much() -> None:
    auto = Auto()
    auto._shares = PoseShares(0.5, 0.0, 0.5, 1)  # 0.75 against 0.75
    for streams in (True, False):
        auto._streams = streams
        auto._decide(WEIGHTED, 1.0)
        assert auto._streams == streams
    auto._streams, auto._shares = True, PoseShares(0.1, 0.1, 0.5, 1)  # 0.825 against 0.75, within the factor 1.1
    auto._decide(WEIGHTED, 1.0)
    assert auto._streams
    auto._shares = PoseShares(0.1, 0.1, 0.0, 1)  # 0.325 against 0.35
    auto._decide(WEIGHTED, 1.2)
    assert auto._streams


def test_auto_keeps_no_graph_of_what_it_observes() -> None:
    auto = Auto()
    coefficients = torch.ones(3, requires_grad=True) * 2
    auto.observe_plain(coefficients)
    (pending,) = auto._pending
    assert not pending.sizes.requires_grad
    assert pending.sizes.data_ptr() != coefficients.data_ptr()

"""Poses with a negligible coefficient get no backward, and the report counts them."""

from typing import Any

import pytest
import torch
from chosen_device import needs
from model_zoo import ModelCase, TensorFactory, mlp
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    COMBINATIONS,
    assert_bit_equal,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_combined,
    train_full_graph,
    trained_leaves,
)

import gradhooks

POSES = 100
MOST_BACKWARDS = 15
ORDERS = ["random", "best last", "best first"]


class Shifted(nn.Module):
    """Predicts approximately the height that is given with the pose."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, features: Tensor, height: Tensor) -> Tensor:
        return 0.1 * self.net(features) + height


def spread_predictions(factory: TensorFactory, seed: int, order: str = "random", extent: float = 1.0) -> ModelCase:
    """Build a case of a hundred poses whose predictions have a standard deviation of about `extent`."""
    manual_seed(seed)
    model = Shifted().to(factory.device, factory.dtype)
    features, heights = factory.randn(POSES, 4), extent * factory.randn(POSES)
    if order != "random":
        with torch.no_grad():
            ranks = model(features, heights.unsqueeze(1)).squeeze(1).argsort(descending=order != "best first")
        features, heights = features[ranks], heights[ranks]
    poses = list(zip(features, heights, strict=True))
    return ModelCase(model, lambda count: poses[:count])


def trained(case: ModelCase, scorer: gradhooks.MultiPose, loss: Any = loss_on_combined) -> dict[str, Tensor | None]:
    for leaf in trained_leaves(case, None).values():
        leaf.grad = None
    loss(scorer(case.make_poses(POSES))).backward()
    return gradients_of(trained_leaves(case, None))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("combination", ["min", "max"])
@pytest.mark.parametrize("seed", range(3))
def test_few_poses_get_a_backward(seed: int, combination: str, order: str, double: TensorFactory) -> None:
    case = spread_predictions(double, seed, order)
    expected = train_full_graph(
        spread_predictions(double, seed, order), COMBINATIONS[combination], loss_on_combined, POSES
    )
    for accumulator in ("auto", "recompute"):
        with case_label(accumulator):
            scorer = gradhooks.MultiPose(case.model, combination, accumulator=accumulator, memory=0)
            assert_same_gradients(trained(case, scorer), expected.gradients, tolerance=1e-10)
            assert 1 <= scorer.report.backwards <= MOST_BACKWARDS
            assert scorer.report.skipped == POSES - scorer.report.backwards
            assert scorer.report.accumulator == "recompute"


@pytest.mark.parametrize("seed", range(6))
def test_few_poses_get_a_backward_by_stream_in_random_order(seed: int, double: TensorFactory) -> None:
    needs("skipping in a stream")
    case = spread_predictions(double, seed)
    scorer = gradhooks.MultiPose(case.model, "min", accumulator="stream", memory=0)
    result = trained(case, scorer)
    expected = train_full_graph(spread_predictions(double, seed), COMBINATIONS["min"], loss_on_combined, POSES)
    assert_same_gradients(result, expected.gradients, tolerance=1e-10)
    assert 1 <= scorer.report.backwards <= MOST_BACKWARDS
    assert (scorer.report.recomputed, scorer.report.skipped) == (0, POSES - scorer.report.backwards)


@pytest.mark.parametrize("order", ORDERS)
def test_a_stream_is_exact_in_every_order(order: str, double: TensorFactory) -> None:
    case = spread_predictions(double, 1, order)
    result = trained(case, gradhooks.MultiPose(case.model, "min", accumulator="stream", memory=0))
    expected = train_full_graph(spread_predictions(double, 1, order), COMBINATIONS["min"], loss_on_combined, POSES)
    assert_same_gradients(result, expected.gradients, tolerance=1e-10)


def test_auto_needs_few_backwards_in_every_group(double: TensorFactory) -> None:
    scorer = gradhooks.MultiPose(Shifted().to(double.device, double.dtype), "min", memory=0)
    for seed in range(4):
        for order in ORDERS[::-1]:
            loss_on_combined(scorer(spread_predictions(double, seed, order).make_poses(POSES))).backward()
            assert scorer.report.backwards <= MOST_BACKWARDS, (seed, order, scorer.report)


def test_no_pose_is_skipped_if_all_are_significant(double: TensorFactory) -> None:
    case = spread_predictions(double, 0, extent=1e-3)
    for accumulator in ("stream", "recompute", "auto"):
        scorer = gradhooks.MultiPose(
            case.model, gradhooks.combinations.Min(scale=1.0), accumulator=accumulator, memory=0
        )
        trained(case, scorer)
        assert (scorer.report.backwards, scorer.report.skipped) == (POSES, 0)


@pytest.mark.parametrize("accumulator", ["stream", "recompute"])
def test_a_tolerance_of_zero_skips_exact_zeros_only(accumulator: str, double: TensorFactory) -> None:
    if accumulator == "stream":
        needs("skipping in a stream")
    case = spread_predictions(double, 2, "best first")
    scorer = gradhooks.MultiPose(case.model, "min", accumulator=accumulator, tolerance=0.0, memory=0)
    prediction = scorer(case.make_poses(POSES))
    loss_on_combined(prediction).backward()
    # A coefficient that is denormal here may be rounded to zero there.
    nonzero = prediction.coefficients().abs() > 0
    normal = prediction.coefficients().abs() > 1e-290
    assert normal.sum() <= scorer.report.backwards <= nonzero.sum() + 1
    assert POSES > scorer.report.backwards > backwards_by_default(case)
    assert scorer.report.skipped == POSES - scorer.report.backwards


def backwards_by_default(case: ModelCase) -> int:
    """Return the number of backwards with the default tolerance."""
    scorer = gradhooks.MultiPose(case.model, "min", accumulator="recompute", memory=0)
    trained(case, scorer)
    return scorer.report.backwards


def test_recompute_with_a_tolerance_of_zero_is_bit_equal(single: TensorFactory) -> None:
    case = spread_predictions(single, 3)
    result = trained(case, gradhooks.MultiPose(case.model, "min", accumulator="recompute", tolerance=0.0, memory=0))
    expected = train_full_graph(spread_predictions(single, 3), COMBINATIONS["min"], loss_on_combined, POSES)
    assert_bit_equal(result, expected.gradients)


@pytest.mark.parametrize("accumulator", ["stream", "recompute"])
def test_a_larger_tolerance_skips_more_poses_within_its_error(accumulator: str, double: TensorFactory) -> None:
    if accumulator == "stream":
        needs("skipping in a stream")
    case = spread_predictions(double, 4, extent=0.01)
    backwards = []
    reference = spread_predictions(double, 4, extent=0.01)
    expected = train_full_graph(reference, COMBINATIONS["min"], loss_on_combined, POSES).gradients
    for tolerance in (0.0, 1e-6, 1e-2):
        scorer = gradhooks.MultiPose(case.model, "min", accumulator=accumulator, tolerance=tolerance, memory=0)
        result = trained(case, scorer)
        backwards.append(scorer.report.backwards)
        assert_same_gradients(result, expected, tolerance=max(1e-12, 3 * POSES * tolerance))
    assert backwards[0] > backwards[1] > backwards[2] >= 1


# -- the report -------------------------------------------------------------------------------------------


def reported(accumulator: str, loss: Any, factory: TensorFactory, combination: str = "min") -> gradhooks.Report:
    case = spread_predictions(factory, 5)
    scorer = gradhooks.MultiPose(case.model, combination, accumulator=accumulator, memory=0)
    trained(case, scorer, loss)
    assert scorer.report.poses == POSES
    assert scorer.report.plain == 0
    assert scorer.report.chunks == POSES
    return scorer.report


def of_ten_poses(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.per_pose[::10].square().sum()


def test_the_report_of_a_recomputed_group(double: TensorFactory) -> None:
    report = reported("recompute", loss_on_combined, double)
    assert report.backwards == report.recomputed
    assert report.backwards + report.skipped == POSES
    report = reported("recompute", of_ten_poses, double)
    assert (report.backwards, report.recomputed, report.skipped) == (10, 10, 90)
    assert report.accumulator == "recompute"


def test_the_report_of_a_streamed_group(double: TensorFactory) -> None:
    report = reported("stream", loss_on_combined, double)
    assert report.recomputed == 0
    assert report.backwards + report.skipped == POSES
    streamed = report.backwards
    report = reported("stream", of_ten_poses, double)
    assert (report.backwards, report.recomputed) == (streamed + 10, 10)
    assert POSES - streamed - 10 <= report.skipped <= POSES - 10
    assert report.accumulator == "stream"


def test_the_report_of_a_stored_group(double: TensorFactory) -> None:
    for loss in (loss_on_combined, of_ten_poses):
        report = reported("store", loss, double)
        assert (report.backwards, report.recomputed, report.skipped) == (POSES, 0, 0)
        assert report.accumulator == "store"


def test_the_report_of_auto_names_the_accumulator_and_the_reason(double: TensorFactory) -> None:
    report = reported("auto", loss_on_combined, double)
    assert report.accumulator == "recompute"
    assert report.reason == "no earlier batch shows how many poses matter"
    report = reported("auto", loss_on_combined, double, combination="mean")
    assert report.accumulator == "stream"
    assert report.reason == "all poses have the same weight"


def test_the_report_before_the_backward(double: TensorFactory) -> None:
    case = spread_predictions(double, 5)
    scorer = gradhooks.MultiPose(case.model, "min", accumulator="recompute", memory=0)
    assert scorer.report == gradhooks.Report()
    scorer(case.make_poses(POSES))
    assert (scorer.report.poses, scorer.report.backwards, scorer.report.skipped) == (POSES, 0, 0)
    with torch.no_grad():
        scorer(case.make_poses(7))
    assert (scorer.report.poses, scorer.report.backwards) == (7, 0)

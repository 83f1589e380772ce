"""The accumulators serve a batch of groups as the full graph does, one sum or list for each group."""

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from grouped_combinations import GROUPS, EachGroup, engine_with_groups
from model_zoo import TensorFactory
from stream_combinations import DECLARED, gradhooks_warnings
from test_stream_declarations import probabilities
from torch import Tensor, nn
from training_reference import assert_same_gradients, case_label, gradients_of, trained_leaves

import gradhooks
from gradhooks.engine.pose_engine import PoseEngine
from gradhooks.testing import full_graph

Loss = Callable[[gradhooks.MultiPosePrediction], Tensor]


def loss_on_groups(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    """Rank the groups, so that the coefficients of one depend on the others."""
    combined = prediction.combined.flatten()
    return (combined * torch.arange(1.0, 1 + len(combined), device=combined.device)).square().sum() + combined.prod()


def loss_on_both(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return loss_on_groups(prediction) + prediction.per_pose[::2].square().sum()


def trained(
    combination: Callable[[], gradhooks.Combination],
    groups: list[int],
    loss: Loss,
    factory: TensorFactory,
    sharpness: float,
    **options: Any,
) -> tuple[dict[str, Tensor | None], gradhooks.Report | None]:
    """Return the gradients of one step, of the full graph if there are no options."""
    case = probabilities(factory, len(groups), sharpness)
    module, poses = EachGroup(combination(), groups), case.make_poses(len(groups))
    if not options:
        loss(full_graph(case.model, poses, module)).backward()
        return gradients_of(trained_leaves(case, None)), None
    with engine_with_groups(groups, options.pop("memory_left", 0)), gradhooks_warnings() as messages:
        scorer = gradhooks.MultiPose(case.model, module, collate=torch.stack, **options)
        loss(scorer(poses)).backward()
    assert messages == []
    return gradients_of(trained_leaves(case, None)), scorer.report


@pytest.mark.parametrize("chunk_size", [1, 3, 20])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("combination", DECLARED)
def test_stream_explains_every_group(combination: str, name: str, chunk_size: int, double: TensorFactory) -> None:
    groups = GROUPS[name]
    for sharpness in (0.1, 3.0, 30.0):
        arguments = (DECLARED[combination], groups, loss_on_groups, double, sharpness)
        expected, _ = trained(*arguments)
        result, report = trained(*arguments, accumulator="stream", chunk_size=chunk_size)
        with case_label(sharpness):
            assert_same_gradients(result, expected, tolerance=1e-11)
            assert report is not None
            assert report.recomputed == 0
            assert report.backwards + report.skipped == len(groups)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("accumulator", ["stream", "recompute", "store", "auto"])
@pytest.mark.parametrize("combination", ["mean", "min", "boltzmann"])
def test_a_loss_on_groups_and_poses(combination: str, accumulator: str, chunk_size: int, double: TensorFactory) -> None:
    arguments = (DECLARED[combination], GROUPS["ragged"], loss_on_both, double, 3.0)
    expected, _ = trained(*arguments)
    result, report = trained(*arguments, accumulator=accumulator, chunk_size=chunk_size)
    assert_same_gradients(result, expected, tolerance=1e-11)
    assert report is not None
    if accumulator == "stream":
        assert report.recomputed == len(GROUPS["ragged"][::2])


def test_a_group_without_finite_coefficients_does_not_reach_the_others(double: TensorFactory) -> None:
    case = probabilities(double, 6)
    groups = [0, 1, 0, 1, 0, 1]
    with engine_with_groups(groups):
        scorer = gradhooks.MultiPose(case.model, EachGroup(gradhooks.combinations.Mean(), groups), accumulator="stream")
        prediction = scorer(case.make_poses(6))
        prediction.combined.backward(torch.tensor([[1.0], [torch.inf]]).to(prediction.combined))
    assert scorer.report.recomputed == 3


def test_one_backward_for_each_group_of_a_chunk(double: TensorFactory) -> None:
    for combination, expected in (("mean", 2), ("boltzmann", 3)):  # two poses of group 0, one of group 1
        case = probabilities(double, 3, 0.1)
        groups = [0, 1, 0]
        module = EachGroup(DECLARED[combination](), groups)
        scorer = gradhooks.MultiPose(case.model, module, accumulator="stream", chunk_size=3, collate=torch.stack)
        backward = mock.patch.object(PoseEngine, "backward", autospec=True, side_effect=PoseEngine.backward)
        with engine_with_groups(groups), backward as calls:
            scorer(case.make_poses(3))
        assert calls.call_count == expected, combination
        assert scorer.report.backwards == 3


class Agreement(gradhooks.GradientCombination):
    """Scale the mean gradient of a group by the number of its poses and by their largest gradient."""

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> dict[str, Tensor]:
        assert len(predictions) == len(coefficients)
        scale = len(predictions) * predictions.max()
        return {name: scale * (rows * rows.abs().amax()).sum(0) for name, rows in gradients.items()}


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("name", GROUPS)
def test_combine_gradients_gets_one_group(name: str, chunk_size: int, double: TensorFactory) -> None:
    class EachAgreement(EachGroup, gradhooks.GradientCombination):
        combine_gradients = Agreement.combine_gradients

    groups = GROUPS[name]
    case, plain = (probabilities(double, len(groups)) for _ in range(2))
    with engine_with_groups(groups):
        scorer = gradhooks.MultiPose(
            case.model, EachAgreement(Agreement(), groups), chunk_size=chunk_size, collate=torch.stack
        )
        scorer(case.make_poses(len(groups))).combined.sum().backward()
    assert scorer.report.accumulator == "store"
    leaves = trained_leaves(plain, None)
    expected = dict.fromkeys(leaves, torch.zeros((), dtype=torch.float64))
    poses = plain.make_poses(len(groups))
    for group in set(groups):
        predictions = torch.cat([plain.model(pose) for pose, own in zip(poses, groups, strict=True) if own == group])
        rows = [torch.autograd.grad(one, list(leaves.values()), retain_graph=True) for one in predictions]
        stacks = {leaf: torch.stack(column) for leaf, column in zip(leaves, zip(*rows, strict=True), strict=True)}
        combined = Agreement().combine_gradients(stacks, predictions.detach(), predictions)
        expected = {leaf: expected[leaf] + combined[leaf] for leaf in leaves}
    assert_same_gradients(gradients_of(trained_leaves(case, None)), {**expected})


def test_auto_streams_groups_only_where_their_sums_fit(double: TensorFactory) -> None:
    groups = GROUPS["sorted"]
    arguments = (DECLARED["mean"], groups, loss_on_groups, double, 1.0)
    model = probabilities(double, 1).model
    copies = 3 * sum(parameter.nbytes for parameter in model.parameters())
    _, report = trained(*arguments, accumulator="auto", memory=0, memory_left=copies - 1)
    assert report is not None
    assert (report.accumulator, report.reason) == (
        "recompute",
        "streaming needs 3 copies of the gradients, which do not fit in memory",
    )
    _, report = trained(*arguments, accumulator="auto", memory=0, memory_left=copies)
    assert report is not None
    assert report.accumulator == "stream"


def test_auto_counts_a_sum_for_each_feature(double: TensorFactory) -> None:
    arguments = (DECLARED["boltzmann"], GROUPS["sorted"], loss_on_groups, double, 1.0)
    copies = 6 * sum(parameter.nbytes for parameter in probabilities(double, 1).model.parameters())
    for memory_left, reason in ((copies - 1, "streaming needs 6 copies"), (copies, "no earlier batch")):
        _, report = trained(*arguments, accumulator="auto", memory=0, memory_left=memory_left)
        assert report is not None
        assert report.reason.startswith(reason)


def test_auto_counts_the_backwards_of_a_chunk(double: TensorFactory) -> None:
    for groups, chunk_size, combination, accumulator in (
        ([0] * 6, 3, "mean", "stream"),
        ([0, 1, 0, 0, 1, 0], 3, "mean", "recompute"),  # two groups in each chunk
        ([0, 0, 0, 1, 1, 1], 3, "mean", "stream"),
    ):
        arguments = (DECLARED[combination], groups, loss_on_groups, double, 1.0)
        _, report = trained(*arguments, accumulator="auto", chunk_size=chunk_size, memory=0, memory_left=2**20)
        assert report is not None
        assert report.accumulator == accumulator, groups


def test_stream_keeps_the_sums_of_large_and_small_parameters(double: TensorFactory) -> None:
    groups = GROUPS["interleaved"]
    poses = list(double.randn(len(groups), 8))

    def build() -> nn.Sequential:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(8, 1100), nn.Tanh(), nn.Linear(1100, 9), nn.Tanh(), nn.Linear(9, 1)).to(
            double.device, torch.float64
        )

    model, reference = build(), build()
    for chunk_size in (1, 4):
        model.zero_grad()
        reference.zero_grad()
        module = EachGroup(gradhooks.combinations.Boltzmann(), groups)
        with engine_with_groups(groups):
            scorer = gradhooks.MultiPose(
                model, module, accumulator="stream", chunk_size=chunk_size, collate=torch.stack
            )
            loss_on_groups(scorer(poses)).backward()
        loss_on_groups(full_graph(reference, poses, module)).backward()
        assert_same_gradients(
            gradients_of(dict(model.named_parameters())), gradients_of(dict(reference.named_parameters()))
        )

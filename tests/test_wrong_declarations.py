"""A wrong declaration for "stream" gives a warning and the right gradient."""

import functools
import math

import pytest
import torch
from model_zoo import TensorFactory, build
from stream_combinations import TEMPERATURE, Declare, Thermal, declare_thermal, gradhooks_warnings
from torch import Tensor
from training_reference import (
    LOSSES,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_combined,
    train_full_graph,
    trained_leaves,
)

import gradhooks
from gradhooks import StreamWeights
from gradhooks.errors import CombinationError


@functools.cache
def thermal_gradients(name: str, loss: str, count: int, factory: TensorFactory) -> Gradients:
    return train_full_graph(build(name, factory), lambda: Thermal(declare_thermal), LOSSES[loss], count).gradients


def log_weight_of_high_poses(value: float) -> Declare:
    """Declare `value` as the log-weight of every pose above 0.1, and the right one for the others."""

    def declare(y: Tensor) -> StreamWeights:
        return StreamWeights(torch.where(y > 0.1, value, -y / TEMPERATURE), y / TEMPERATURE)

    return declare


def feature_of_high_poses(value: float) -> Declare:
    def declare(y: Tensor) -> StreamWeights:
        return StreamWeights(-y / TEMPERATURE, torch.where(y > 0.1, value, y / TEMPERATURE))

    return declare


WRONG: dict[str, Declare] = {
    "temperature": lambda y: StreamWeights(-y / 0.9, y / 0.9),
    "temperature, slightly": lambda y: StreamWeights(-y / (TEMPERATURE * (1 + 1e-8)), y / TEMPERATURE),
    "sign": lambda y: StreamWeights(y / TEMPERATURE, y / TEMPERATURE),
    "steep": lambda y: StreamWeights(-300 * y, y / TEMPERATURE),
    "steep, with the wrong sign": lambda y: StreamWeights(300 * y, y / TEMPERATURE),
    "constant": lambda _: StreamWeights(),
    "constant log-weights": lambda y: StreamWeights(torch.zeros_like(y)),
    "missing feature": lambda y: StreamWeights(-y / TEMPERATURE),
    "missing log-weights": lambda y: StreamWeights(features=y),
    "another feature": lambda y: StreamWeights(-y / TEMPERATURE, y.square()),
    "log-weights of high poses": log_weight_of_high_poses(0.3),
    "log-weights of high poses nan": log_weight_of_high_poses(math.nan),
    "log-weights of high poses inf": log_weight_of_high_poses(math.inf),
    "log-weights of high poses -inf": log_weight_of_high_poses(-math.inf),
    "features of high poses": feature_of_high_poses(0.3),
    "features of high poses nan": feature_of_high_poses(math.nan),
    "features of high poses inf": feature_of_high_poses(math.inf),
    "all nan": lambda y: StreamWeights(torch.full_like(y, math.nan)),
    "all inf": lambda y: StreamWeights(torch.full_like(y, math.inf)),
    "all -inf": lambda y: StreamWeights(torch.full_like(y, -math.inf)),
    "all features nan": lambda y: StreamWeights(-y / TEMPERATURE, torch.full_like(y, math.nan)),
    "all features inf": lambda y: StreamWeights(-y / TEMPERATURE, torch.full_like(y, math.inf)),
}


@pytest.mark.parametrize("name", ["plain_mlp", "used_by_some_poses", "tied_weights"])
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_declaration(mistake: str, name: str, double: TensorFactory) -> None:
    for loss in ("combined", "both"):
        case = build(name, double)
        scorer = gradhooks.MultiPose(case.model, Thermal(WRONG[mistake]), accumulator="stream")
        with gradhooks_warnings() as forward_messages:
            prediction = scorer(case.make_poses(6))
        assert forward_messages == [], loss
        with gradhooks_warnings() as messages:
            LOSSES[loss](prediction).backward()
        with case_label(loss):
            assert_same_gradients(gradients_of(trained_leaves(case, None)), thermal_gradients(name, loss, 6, double))
        (message,) = messages
        assert message.startswith("combination Thermal: its stream_weights do not explain"), loss
        assert scorer.report.recomputed > 0, loss


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-10, 1e-13, 1e-16])
def test_a_mistake_of_any_size(size: float, double: TensorFactory) -> None:
    # Below the rounding error of the fit it needs no second run.
    case = build("plain_mlp", double)
    wrong = Thermal(lambda y: StreamWeights(-y / TEMPERATURE + size * torch.sin(9 * y), y / TEMPERATURE))
    with gradhooks_warnings() as messages:
        loss_on_combined(gradhooks.MultiPose(case.model, wrong, accumulator="stream")(case.make_poses(7))).backward()
    assert_same_gradients(
        gradients_of(trained_leaves(case, None)), thermal_gradients("plain_mlp", "combined", 7, double)
    )
    assert bool(messages) == (size > 1e-12)


def test_one_warning_for_each_type_of_combination(double: TensorFactory) -> None:
    class OtherThermal(Thermal):
        pass

    def train(combination: Thermal, count: int) -> None:
        case = build("plain_mlp", double)
        loss = gradhooks.MultiPose(case.model, combination, accumulator="stream")(case.make_poses(count)).combined.sum()
        loss.backward(retain_graph=True)
        loss.backward()

    with gradhooks_warnings() as messages:
        train(Thermal(WRONG["sign"]), 5)
        train(Thermal(WRONG["steep"]), 6)
        train(OtherThermal(WRONG["sign"]), 7)
    assert [message.split(":")[0] for message in messages] == ["combination Thermal", "combination OtherThermal"]
    assert "of 5 poses" in messages[0]
    assert "of 7 poses" in messages[1]


def test_the_warning_counts_the_poses(double: TensorFactory) -> None:
    # The other 39 determine the fit, so that only the wrong one has a residual.
    case = build("plain_mlp", double)
    poses = list(double.randn(40, 4))
    with torch.no_grad():
        highest = max(case.model(pose).item() for pose in poses)

    def declare(y: Tensor) -> StreamWeights:
        return StreamWeights(torch.where(y >= highest, -math.inf, -y / TEMPERATURE), y / TEMPERATURE)

    scorer = gradhooks.MultiPose(case.model, Thermal(declare), accumulator="stream")
    with gradhooks_warnings() as messages:
        loss_on_combined(scorer(poses)).backward()
    (message,) = messages
    assert "coefficients of 1 of 40 poses" in message
    assert scorer.report.recomputed == 1


@pytest.mark.parametrize("mistake", WRONG)
def test_other_accumulators_do_not_depend_on_a_declaration(mistake: str, double: TensorFactory) -> None:
    for accumulator in ("auto", "recompute", "store"):
        case = build("plain_mlp", double)
        scorer = gradhooks.MultiPose(case.model, Thermal(WRONG[mistake]), accumulator=accumulator)
        with gradhooks_warnings() as messages:
            loss_on_combined(scorer(case.make_poses(6))).backward()
        with case_label(accumulator):
            assert_same_gradients(
                gradients_of(trained_leaves(case, None)), thermal_gradients("plain_mlp", "combined", 6, double)
            )
        assert len(messages) == (scorer.report.accumulator == "stream"), accumulator


@pytest.mark.parametrize(
    ("declare", "shown"),
    [
        (lambda y: StreamWeights(y.sum()), r"got \(\)"),
        (lambda y: StreamWeights(y.repeat(2)), r"got \(2,\)"),
        (lambda y: StreamWeights(y, y.repeat(2)), r"and \(2,\)"),
        (lambda y: StreamWeights(y, y.view(1, -1, 1)), r"and \(1, 1, 1\)"),
    ],
    ids=["no axis", "too many", "too many features", "too many axes"],
)
def test_a_declaration_of_the_wrong_shape_is_refused(declare: Declare, shown: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    scorer = gradhooks.MultiPose(case.model, Thermal(declare), accumulator="stream")
    with pytest.raises(CombinationError, match=rf"combination Thermal: .* {shown}"):
        scorer(case.make_poses(3))


def test_a_changing_number_of_features_is_refused(double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    calls: list[int] = []

    def declare(y: Tensor) -> StreamWeights:
        calls.append(len(y))
        return StreamWeights(-y, y.unsqueeze(1).expand(-1, min(len(calls), 2)))

    scorer = gradhooks.MultiPose(case.model, Thermal(declare), accumulator="stream")
    with pytest.raises(CombinationError, match="combination Thermal"):
        scorer(case.make_poses(3))


def test_a_declaration_for_some_poses_only_is_refused(double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    calls: list[int] = []

    def declare(y: Tensor) -> StreamWeights | None:
        calls.append(len(y))
        return declare_thermal(y) if len(calls) < 3 else None

    scorer = gradhooks.MultiPose(case.model, Thermal(declare), accumulator="stream")
    with pytest.raises(
        CombinationError, match=r"combination Thermal: .* Declare the same number of features for every pose"
    ):
        scorer(case.make_poses(4))

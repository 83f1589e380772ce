"""A prediction of several groups: `groups`, `split()`, `coefficients()`, dropped poses, and no combination."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from built_in_combinations import BUILT_IN, CLOSED_FORMS, close, every_combination
from groups_of_poses import INDICES
from model_zoo import TensorFactory
from torch import Tensor
from torch.utils._pytree import tree_map

from gradhooks import MultiPosePrediction
from gradhooks.combination import BoundCombination
from gradhooks.combinations import Boltzmann, Mean
from gradhooks.errors import CombinationError, PredictionError
from gradhooks.group_index import GroupIndex
from gradhooks.group_validation import read_index
from gradhooks.options import Nonfinite
from gradhooks.prediction import combine
from gradhooks.testing import full_graph

INDEX = INDICES[-1]


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def predict(
    combination: Any,
    per_pose: Tensor,
    index: list[int] | None = INDEX,
    nonfinite: Nonfinite = "propagate",
    **arguments: Any,
) -> MultiPosePrediction:
    groups = None if index is None else GroupIndex(read_index(index, len(per_pose)), max(index) + 1)
    bound = BoundCombination(combination, len(per_pose), arguments, groups)
    return combine(bound, per_pose.to(torch.promote_types(per_pose.dtype, torch.float32)), per_pose, nonfinite)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@every_combination
def test_coefficients_of_groups(name: str, mode: Any, double: TensorFactory) -> None:
    per_pose = double.randn(10, 2)
    with mode():
        prediction = predict(BUILT_IN[name]().to(per_pose), per_pose)
        coefficients = prediction.coefficients()
    assert prediction.combined.shape == (4, 2)
    assert not coefficients.requires_grad
    assert prediction.groups is not None
    for number in range(4):
        rows = prediction.groups == number
        close(coefficients[rows], CLOSED_FORMS[name](per_pose[rows]), 1e-6 if "learnable" in name else 1e-11)


def test_groups_are_the_index_on_the_device_of_the_predictions(double: TensorFactory) -> None:
    prediction = predict(Mean(), double.randn(10))
    assert prediction.groups is not None
    assert (prediction.groups.tolist(), prediction.groups.dtype) == (INDEX, torch.int64)
    assert prediction.groups.device == prediction.per_pose.device
    assert predict(Mean(), double.randn(10), None).groups is None


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_split(index: list[int], double: TensorFactory) -> None:
    per_pose = double.randn(len(index), 2).requires_grad_()
    prediction = predict(Mean(), per_pose, index)
    parts, groups = prediction.split(), torch.tensor(index, device=double.device)
    assert len(parts) == len(prediction.combined)
    for number, part in enumerate(parts):
        assert torch.equal(part, per_pose[groups == number])
    close(torch.stack([part.mean(0) for part in parts]), prediction.combined)
    loss = sum((number + 1) * part.square().sum() for number, part in enumerate(parts))
    (gradient,) = torch.autograd.grad(loss, per_pose)  # type: ignore[arg-type]
    close(gradient, 2 * (groups + 1).unsqueeze(1) * per_pose)


def test_split_without_groups(double: TensorFactory) -> None:
    prediction = predict(Mean(), double.randn(3), None)
    (part,) = prediction.split()
    assert part is prediction.per_pose


def test_no_combination(double: TensorFactory) -> None:
    per_pose = double.randn(10).bfloat16().requires_grad_()
    for index in (INDEX, None):
        prediction = predict(None, per_pose, index)
        assert prediction.combined is prediction.per_pose is per_pose
        assert torch.equal(prediction.coefficients(), torch.ones_like(per_pose))
    assert len(predict(None, per_pose).split()) == 4
    with pytest.raises(
        CombinationError, match=r"nonfinite='drop' leaves poses out .* combination=None combines nothing"
    ):
        predict(None, per_pose, nonfinite="drop")


@pytest.mark.parametrize("weighted", [False, True])
@every_combination
def test_dropped_poses_of_groups(name: str, weighted: bool, double: TensorFactory) -> None:
    per_pose, arguments = double.randn(10), {"weights": double.randn(10).exp()} if weighted else {}
    per_pose[[1, 5]] = torch.tensor([math.nan, math.inf], dtype=per_pose.dtype, device=per_pose.device)
    leaf = per_pose.clone().requires_grad_()
    combination = BUILT_IN[name]().to(per_pose)
    prediction = predict(combination, leaf, nonfinite="drop", **arguments)
    kept = per_pose.isfinite()
    index = [number for number, keep in zip(INDEX, kept.tolist(), strict=True) if keep]
    rows = {key: argument[kept] for key, argument in arguments.items()}
    expected = predict(combination, per_pose[kept], index, **rows)
    close(prediction.combined, expected.combined)
    coefficients = prediction.coefficients()
    close(coefficients[kept], expected.coefficients())
    assert coefficients[~kept].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(prediction.combined.sum(), leaf)
    close(gradient, coefficients)


def test_a_group_without_finite_predictions(double: TensorFactory) -> None:
    per_pose = double.randn(10)
    per_pose[4] = math.nan  # the only pose of group 1
    with pytest.raises(PredictionError, match=r"^group 1: none of its 1 predictions is finite"):
        predict(Mean(), per_pose, nonfinite="drop")
    assert predict(Mean(), per_pose).combined.isfinite().tolist() == [True, False, True, True]


def test_rebuilt_predictions_keep_their_groups(double: TensorFactory) -> None:
    prediction = predict(Boltzmann(), double.randn(10))
    for twin in (
        tree_map(torch.clone, prediction),
        through_pickle(prediction),
        prediction._replace(combined=prediction.combined.clone()),
        MultiPosePrediction(*(part.float() if part.dtype == torch.float32 else part for part in prediction)),
    ):
        assert twin.groups.tolist() == INDEX
        assert len(twin.split()) == 4
        assert torch.equal(twin.coefficients(), prediction.coefficients())


@pytest.mark.parametrize("read", [lambda p: p.groups, lambda p: p.split(), lambda p: p.coefficients()])
def test_a_prediction_made_of_other_tensors_has_lost_its_groups(read: Any, double: TensorFactory) -> None:
    with pytest.raises(AttributeError, match=r"lost its combination .*; use .* where the batch was run"):
        read(MultiPosePrediction(double.randn(4), double.randn(10)))


def test_a_bound_combination_can_be_copied(double: TensorFactory) -> None:
    bound = BoundCombination(Mean(), 10, {}, GroupIndex(torch.tensor(INDEX), 4))
    predictions = double.randn(10)
    expected = bound(predictions)
    for twin in (copy.deepcopy(bound), through_pickle(bound)):
        assert torch.equal(twin(predictions), expected)


def test_the_full_graph_of_groups(double: TensorFactory) -> None:
    model, poses = torch.nn.Linear(3, 1).to(double.device, double.dtype), double.randn(10, 3)
    prediction = full_graph(model, poses, Boltzmann(), INDEX)
    close(prediction.combined, predict(Boltzmann(), model(poses)).combined)
    close(prediction.combined[1], model(poses[4]))

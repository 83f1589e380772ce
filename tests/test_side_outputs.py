"""Side losses: what `call=` returns beside the prediction comes back as `prediction.side`, with its gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_reference import ACCUMULATORS_AND_PLAIN, options_of

import gradhooks
from gradhooks.profiling.training_batch import TrainingBatch

pytestmark = pytest.mark.usefixtures("_on_the_device")

POSES = 6


class Mixture(nn.Module):
    """Two experts, and a router whose logits a balance loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    def forward(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(pose)
        outputs = torch.cat([expert(pose.tanh()) for expert in self.experts], -1)
        return (outputs * logits.softmax(-1)).sum(-1), logits


def with_logits(model: nn.Module, pose: Tensor) -> tuple[Tensor, Tensor]:
    prediction, logits = model(pose)
    return prediction, logits


def loss_of(combined: Tensor, side: Tensor) -> Tensor:
    """The usual loss, and a balance loss over all poses."""
    return combined.square().sum() + side.softmax(-1).mean(0).square().sum()


def expected_gradients(model: nn.Module, poses: Tensor, groups: Tensor) -> list[Tensor | None]:
    outputs = [model(pose) for pose in poses]
    predictions = torch.stack([prediction for prediction, _ in outputs])
    combined = torch.stack([predictions[groups == group].mean() for group in groups.unique()])
    loss_of(combined, torch.stack([logits for _, logits in outputs])).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_a_balance_loss_is_trained(accumulator: str, stacked: bool) -> None:
    model = Mixture().double()
    poses, groups = torch.randn(POSES, 4, dtype=torch.float64), torch.tensor([1, 0, 1, 0, 0, 1])
    expected = expected_gradients(model, poses, groups)
    scorer = gradhooks.MultiPose(model, "mean", call=with_logits, **options_of(accumulator))
    for _ in range(2):
        prediction = scorer(poses if stacked else list(poses), groups=groups)
        assert prediction.side is not None
        assert prediction.side.shape == (POSES, 2)
        assert prediction.per_pose.shape == (POSES,)
        loss_of(prediction.combined, prediction.side).backward()
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
        model.zero_grad()


def test_prediction_and_side_keep_their_shapes_and_dtypes() -> None:
    model = nn.Linear(4, 6)

    def call(model: nn.Module, pose: Tensor) -> tuple[Tensor, Tensor]:
        output = model(pose)
        return output[:4].view(2, 2), output[4].double()

    for memory in (0, "1GiB"):
        prediction = gradhooks.MultiPose(model, "mean", call=call, memory=memory)(list(torch.randn(3, 4)))
        assert prediction.side is not None
        assert (prediction.per_pose.shape, prediction.per_pose.dtype) == ((3, 2, 2), torch.float32)
        assert (prediction.side.shape, prediction.side.dtype) == ((3,), torch.float64)
        assert prediction.side.requires_grad
    with torch.no_grad():
        assert scorer_side(model, call) == (3,)


def scorer_side(model: nn.Module, call: Any) -> tuple[int, ...]:
    side = gradhooks.MultiPose(model, "mean", call=call)(list(torch.randn(3, 4))).side
    assert side is not None
    return tuple(side.shape)


def test_a_side_that_is_dropped_or_not_used_changes_nothing() -> None:
    model = Mixture().double()
    poses = list(torch.randn(POSES, 4, dtype=torch.float64))
    gradhooks.MultiPose(model, "max", call=with_logits, memory=0)(poses).combined.backward()
    with_side = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    gradhooks.MultiPose(model, "max", call=lambda model, pose: model(pose)[0], memory=0)(poses).combined.backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], with_side)


def test_the_reference_of_gradcheck_has_sides() -> None:
    batch = TrainingBatch(Mixture(), list(torch.randn(POSES, 4)), "mean", call=with_logits)
    prediction = batch.combined(
        [batch.run(0, 1), batch.run(1, 2)] + [batch.run(pose, pose + 1) for pose in range(2, 6)]
    )
    assert prediction.side is not None
    assert prediction.side.shape == (POSES, 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda model, pose: (model(pose)[0], "text"), "the side cannot be used: pose 0.*returned one str"),
    (lambda model, pose: (model(pose)[0], torch.ones(2, dtype=torch.int64)), "the side cannot be used.*torch.int64"),
    (lambda model, pose: (model(pose)[0], torch.ones(1 + (pose.sum() > 0))), "pose [1-5]: call= returned a prediction"),
    (lambda model, pose: model(pose) if pose.sum() > 0 else model(pose)[0], "no side"),
])  # fmt: skip
def test_unusable_sides_are_refused(call: Any, message: str) -> None:
    poses = [torch.full((4,), sign) for sign in (1.0, -1.0, 1.0, -1.0)]
    with pytest.raises(gradhooks.errors.PredictionError, match=message):
        gradhooks.MultiPose(Mixture(), "mean", call=call, memory=0)(poses)


def test_gradcheck_compares_side_losses() -> None:
    def loss(prediction: gradhooks.MultiPosePrediction) -> Tensor:
        assert prediction.side is not None
        return loss_of(prediction.combined, prediction.side)

    result = gradhooks.gradcheck(Mixture(), list(torch.randn(POSES, 4)), "boltzmann", loss=loss, call=with_logits)
    assert result.passed, result

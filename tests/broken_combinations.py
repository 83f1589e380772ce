"""Combinations that violate one rule of the contract each, with the check that refuses them and its message."""
# ruff: noqa: ARG002

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradhooks import Combination, GradientCombination, StreamWeights
from gradhooks.group_reductions import expand_groups, group_mean, group_sum


class KeepsAxis(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0, keepdim=True)


class SampleVariance(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.square().sum(0) / (len(predictions) - 1)


class FirstPose(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions[0] + 0 * predictions.sum(0)


class RunningMean(Combination):
    def __init__(self) -> None:
        super().__init__()
        self.momentum = torch.zeros(())

    def forward(self, predictions: Tensor) -> Tensor:
        self.momentum = self.momentum + predictions.detach().mean()
        return predictions.mean(0) + self.momentum


class ChangesInPlace(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        with torch.no_grad():
            predictions -= predictions.mean(0)
        return predictions.exp().mean(0)


class Exponentials(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.exp().sum(0).log()


class AlwaysDouble(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.double().mean(0)


class HoldsLock(Combination):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HoldsLock":
        return type(self)()

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)


class DetachesWeights(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return (predictions.detach().softmax(0) * predictions).sum(0)


class CutsGraph(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.detach().mean(0)


class UnusedParameter(Combination):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, predictions: Tensor) -> Tensor:
        return (predictions * self.temperature.item()).mean(0)


class WrongSign(Combination):
    """A wrong declaration, which costs time but trains with exact gradients."""

    def forward(self, predictions: Tensor) -> Tensor:
        return -torch.logsumexp(-predictions.double(), 0).to(predictions.dtype)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights(predictions.double())


class DeclaresByGroup(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return torch.logsumexp(predictions, 0)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights(predictions - predictions.mean())


class DeclaresWrongShape(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights(predictions.sum())


class DeclaresSome(Combination):
    """Declares weights in the first call of stream_weights only."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, predictions: Tensor) -> Tensor:
        return torch.logsumexp(predictions, 0)

    def stream_weights(self, predictions: Tensor) -> StreamWeights | None:
        self.calls += 1
        return StreamWeights(predictions) if self.calls < 2 else None


class DividesByPoses(Combination):
    """A mean over each group that is divided by the number of all poses."""

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        return group_sum(predictions, groups, count) / len(predictions)


class DetachesMeans(Combination):
    """The right results of groups with wrong derivatives."""

    def forward(self, predictions: Tensor) -> Tensor:
        return (predictions - 0.5 * predictions.mean(0)).sum(0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        means = group_mean(predictions, groups, count).detach()
        return group_sum(predictions - 0.5 * expand_groups(means, groups), groups, count)


class OneMaximum(Combination):
    """The exponentials of all groups are taken relative to one maximum, so those of some groups underflow."""

    def forward(self, predictions: Tensor) -> Tensor:
        return torch.logsumexp(predictions, 0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        top = predictions.detach().max()
        return group_sum((predictions - top).exp(), groups, count).log() + top


class ReturnsDouble(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        return group_mean(predictions.double(), groups, count)


class OneRowTooMany(ReturnsDouble):
    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        return group_mean(predictions, groups, count + 1)

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)


class MultipliesByMask(Combination):
    """A NaN times 0 is NaN in every group."""

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.sum(0)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        mask = (groups == torch.arange(count).unsqueeze(1)).to(predictions)
        return mask @ predictions


class MeanOfNone(Combination):
    accepts_empty_groups = True

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)


class LosesNames(GradientCombination):
    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(0)

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        return {name: rows.mean(0) for name, rows in gradients.items() if "bias" not in name}


class DividesByNorm(LosesNames):
    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        return {name: rows.mean(0) / rows.norm() for name, rows in gradients.items()}


BROKEN_COMBINATIONS: list[tuple[type[Combination], str, str]] = [
    (KeepsAxis, "check_result_shape", r"returned shape \(1,\) .* reduce axis 0"),
    (SampleVariance, "check_one_pose", "divide by N - 1"),
    (FirstPose, "check_order_of_poses", "depends on the order of the poses"),
    (RunningMean, "check_repeatable", "keep no state in forward"),
    (ChangesInPlace, "check_repeatable", "changed the predictions in place"),
    (Exponentials, "check_extreme_values", "all 1e4; compute with logarithms"),
    (AlwaysDouble, "check_dtype_and_device", r"torch.float64 on cpu for predictions in torch.float32"),
    (HoldsLock, "check_copies", "cannot be copied by pickle"),
    (DetachesWeights, "check_coefficients", "does it detach a part"),
    (CutsGraph, "check_coefficients", "cut the graph"),
    (UnusedParameter, "check_learnable_parameters", "gives its parameter 'temperature' no gradient"),
    (WrongSign, "check_stream_declaration", "do not explain its coefficients: pose .* correct it, or return None"),
    (DeclaresByGroup, "check_stream_declaration", "row i may depend on prediction i only"),
    (DeclaresWrongShape, "check_stream_declaration", r"log_weights of shape \(\)"),
    (DeclaresSome, "check_training", "stream_weights declared 0 features for pose 0 and nothing for pose 1"),
    (DividesByPoses, "check_groups", "another result in forward_groups .* differs by .* groups == b"),
    (DetachesMeans, "check_groups", "another gradient of the predictions in forward_groups"),
    (OneMaximum, "check_groups", "another result in forward_groups .* 1000 apart"),
    (ReturnsDouble, "check_groups", "returned torch.float64 from forward_groups, and torch.float32 from forward"),
    (OneRowTooMany, "check_groups", r"forward_groups returned shape \(5,\) for 4 groups"),
    (MultipliesByMask, "check_groups_are_independent", r"a prediction of another group is nan; .*0 \* NaN is NaN"),
    (MeanOfNone, "check_empty_groups", "has the result nan for an empty group"),
    (LosesNames, "check_combined_gradients", "keep the names"),
    (DividesByNorm, "check_combined_gradients", "divide by a norm that can be 0"),
]

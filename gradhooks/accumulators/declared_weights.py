"""DeclaredWeights: what a combination declares for a chunk, checked."""

from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.accumulators.base import Engine
from gradhooks.accumulators.online_softmax import Declaration
from gradhooks.errors import CombinationError
from gradhooks.numerics import to_float64


class DeclaredWeights(NamedTuple):
    """What a combination declares for some poses, on its device.

    Attributes:
        pose_count: The number of poses.
        log_weights: Shape `(n,)`, or None for equal ones.
        features: Shape `(n,)` or `(n, K)`, or None for none.
    """

    pose_count: int
    log_weights: Tensor | None = None
    features: Tensor | None = None

    @property
    def uniform(self) -> bool:
        """Whether all poses have the same log-weight, whatever they predict."""
        return self.log_weights is None and self.features is None

    @property
    def feature_count(self) -> int:
        """`K`."""
        if self.features is None:
            return 0
        return 1 if self.features.dim() == 1 else self.features.shape[1]

    @property
    def is_on_host(self) -> bool:
        """Whether the host can read the numbers without waiting for a device."""
        return all(part is None or part.device.type == "cpu" for part in (self.log_weights, self.features))

    def on_host(self) -> Declaration:
        """Return the numbers as Python numbers. Waits for the device."""
        log_weights = [0.0] * self.pose_count if self.log_weights is None else self.log_weights.tolist()
        if self.features is None:
            return Declaration(log_weights, [[]] * self.pose_count, self.uniform)
        numbers = self.features.tolist()
        return Declaration(log_weights, [[number] for number in numbers] if self.features.dim() == 1 else numbers)

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the log-weights, shape `(n,)`, and the features, shape `(n, K)`, in float64 on a device."""
        zeros = to_float64(torch.zeros(self.pose_count, device=device))
        log_weights = zeros if self.log_weights is None else to_float64(self.log_weights.to(device))
        if self.features is None:
            return log_weights, zeros.new_empty(self.pose_count, 0)
        return log_weights, to_float64(self.features.to(device)).view(self.pose_count, -1)


def declared_weights(engine: Engine, predictions: Tensor, start: int = 0) -> DeclaredWeights | None:
    """Return what the combination declares for the poses from `start` on, None without a declaration.

    Args:
        engine: The batch.
        predictions: Shape `(n, *prediction)`.
        start: The index of their first pose.

    Raises:
        CombinationError: The declaration does not have the shapes of its contract.
    """
    count = predictions.shape[0]
    if predictions.numel() != count:
        return None
    numbers = predictions.detach()
    declared = engine.declare(numbers if numbers.dim() == 1 else numbers.flatten(), start)
    if declared is None:
        return None
    log_weights, features = declared
    wrong_log_weights = log_weights is not None and log_weights.shape != (count,)
    wrong_features = features is not None and (features.dim() not in {1, 2} or features.shape[0] != count)
    if wrong_log_weights or wrong_features:
        shapes = ["none" if one is None else str(tuple(one.shape)) for one in declared]
        raise CombinationError(
            f"combination {engine.combination.name}: stream_weights of {count} predictions must give log_weights of "
            f"shape ({count},) and features of shape ({count},) or ({count}, K), got {shapes[0]} and {shapes[1]}"
        )
    return DeclaredWeights(count, *(one.detach() if one is not None and one.requires_grad else one for one in declared))

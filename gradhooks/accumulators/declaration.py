"""A combination's declaration for one chunk, brought to the CPU in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradhooks.errors import CombinationError
from gradhooks.group import Group


@dataclass(frozen=True)
class Declaration:
    """The claim, filled in.

    Attributes:
        log_weights: Shape `(n,)`.
        features: Shape `(n, K)`.
        uniform: Whether it weighs all poses alike, whatever they predict.
    """

    log_weights: Tensor
    features: Tensor
    uniform: bool

    def weights(self, top: float, reference: Tensor) -> Tensor:
        """`e_i (1, phi_i - reference)` with `e_i = exp(l_i - top)`, shape `(n, 1 + K)`; 0 where the claim is no number."""
        features = torch.cat([torch.ones(len(self.features), 1, dtype=torch.float64), self.features - reference], 1)
        weights = (self.log_weights - top).exp().unsqueeze(1) * features
        return torch.where(weights.isfinite(), weights, 0.0)

    def top(self) -> tuple[float, Tensor]:
        """The largest finite log-weight, and the features of its pose."""
        finite = torch.where(self.log_weights.isfinite(), self.log_weights, -torch.inf)
        place = int(finite.argmax())
        return float(finite[place]), self.features[place]


def declared(group: Group, predictions: Tensor) -> Declaration | None:
    """What the group's combination declares for some predictions, None where it declares nothing.

    Raises:
        CombinationError: The declaration has other shapes than its contract.
    """
    count = len(predictions)
    if predictions.numel() != count:
        return None
    seen = predictions.detach().flatten()
    claim = group.declare(seen.to(torch.promote_types(seen.dtype, torch.float32)))
    if claim is None:
        return None
    log_weights, features = claim
    uniform = log_weights is None and features is None
    log_weights = torch.zeros(count) if log_weights is None else log_weights
    features = torch.zeros(count, 0) if features is None else features
    features = features.unsqueeze(1) if features.dim() == 1 else features
    if log_weights.shape != (count,) or features.dim() != 2 or len(features) != count:
        raise CombinationError(
            f"combination {group.combination_name}: stream_weights of {count} predictions must give log_weights of "
            f"shape ({count},) and features of shape ({count},) or ({count}, K), got {tuple(log_weights.shape)} and "
            f"{tuple(features.shape)}"
        )
    return Declaration(_on_host(log_weights), _on_host(features), uniform)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)

"""Predictions, models and poses for the conformance checks."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.testing.errors import CheckFailed

REFERENCE_DTYPE = torch.float64
"""The dtype of every check that compares numbers."""


class Sample(NamedTuple):
    """A combination, bound to the arguments of a call, with predictions of shape `(N, *prediction)` for it."""

    bound: BoundCombination
    predictions: Tensor

    @property
    def combination(self) -> Any:
        """The private copy of the combination under test."""
        return self.bound.combination

    def combine(self, predictions: Tensor) -> Tensor:
        """Combine other predictions of the same shape.

        Raises:
            CheckFailed: The result is not a floating-point tensor.
        """
        result = self.bound(predictions)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            raise CheckFailed(f"returned {result!r}; forward must return one floating-point tensor")
        return result

    def coefficients(self, predictions: Tensor) -> Tensor:
        """Compute `d combined / d predictions`, summed over the elements of the combined prediction.

        Raises:
            CheckFailed: The result is not connected to the predictions.
        """
        leaf = predictions.detach().clone().requires_grad_()
        result = self.combine(leaf)
        if not result.requires_grad:
            raise CheckFailed(
                "cut the graph: its result does not require grad; do not use detach(), item() or no_grad() in forward"
            )
        (coefficients,) = torch.autograd.grad(result.sum(), leaf)
        return coefficients


def make_sample(
    combination: Any,
    count: int,
    *,
    dtype: torch.dtype = REFERENCE_DTYPE,
    device: str | torch.device = "cpu",
) -> Sample:
    """Create a group of `count` predictions for a private copy of the combination.

    The predictions are standard normal numbers, unless the combination has a method `example(count)` that returns
    predictions, or a tuple of predictions and keyword arguments of the call.
    """
    torch.manual_seed(0)
    make_example = getattr(combination, "example", None)
    example = torch.randn(count) if make_example is None else make_example(count)
    predictions, arguments = example if isinstance(example, tuple) else (example, {})
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    bound = BoundCombination(private_copy(combination, dtype, device), count, moved)
    return Sample(bound, predictions.detach().to(device, dtype))


def private_copy(combination: Any, dtype: torch.dtype = REFERENCE_DTYPE, device: str | torch.device = "cpu") -> Any:
    """Copy the combination, so that a check cannot change the user's object, and convert the copy."""
    own = copy.deepcopy(combination)
    return own.to(device, dtype) if isinstance(own, nn.Module) else own


def trainable_parameters(combination: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of a combination that require grad, by name."""
    if not isinstance(combination, nn.Module):
        return {}
    return {name: parameter for name, parameter in combination.named_parameters() if parameter.requires_grad}


class Network(nn.Module):
    """Predict the numbers of the example plus a small correction that depends on trainable parameters.

    A pose is `(features, example)`, of shapes `(3,)` and `(*prediction)`.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4, dtype=REFERENCE_DTYPE)
        self.outer = nn.Linear(4, outputs, dtype=REFERENCE_DTYPE)

    def forward(self, features: Tensor, example: Tensor) -> Tensor:
        correction: Tensor = self.outer(self.inner(features).tanh())
        return example + 0.1 * correction.tanh().view_as(example)


def network_and_poses(predictions: Tensor) -> tuple[Network, list[tuple[Tensor, Tensor]]]:
    """Create a model, and poses for which it predicts about `predictions`, shape `(N, *prediction)`."""
    torch.manual_seed(1)
    network = Network(max(1, predictions[0].numel()))
    return network, [(torch.randn(3, dtype=REFERENCE_DTYPE), row) for row in predictions]


def largest_difference(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected number, or to 1 if all are smaller.

    It is infinite if the shapes differ or a number is not finite.
    """
    if result.shape != expected.shape or not (result.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    size = max(1.0, expected.abs().max().item())
    return (result.to(expected) - expected).abs().max().item() / size

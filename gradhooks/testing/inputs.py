"""What the checks feed a combination with."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.testing.errors import CheckFailed

REFERENCE_DTYPE = torch.float64
"""The precision of every check that compares numbers."""


class Sample(NamedTuple):
    """A combination, bound to the arguments of a call, with predictions of shape `(N, *prediction)` for it."""

    bound: BoundCombination
    predictions: Tensor

    def combined(self, predictions: Tensor) -> Tensor:
        """The combination of other predictions of that shape.

        Raises:
            CheckFailed: It is no floating-point tensor.
        """
        result = self.bound(predictions)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            raise CheckFailed(f"returned {result!r}; forward must return one floating-point tensor")
        return result

    def coefficients(self, predictions: Tensor, cotangent: Tensor | None = None) -> Tensor:
        """`d combined / d predictions`, summed over what is combined, or over it times `cotangent`.

        Raises:
            CheckFailed: No gradient comes back.
        """
        leaf = predictions.detach().clone().requires_grad_()
        result = self.combined(leaf)
        if not result.requires_grad:
            raise CheckFailed(
                "cut the graph: its result does not require grad; leave out detach(), item() and no_grad()"
            )
        (found,) = torch.autograd.grad((result * (1 if cotangent is None else cotangent)).sum(), leaf)
        return found


def sample(
    combination: Any,
    count: int,
    *,
    dtype: torch.dtype = REFERENCE_DTYPE,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Sample:
    """A group of `count` poses for a private copy of the combination.

    Standard normal numbers, unless the combination has a method `example(count)` that returns predictions, and maybe
    arguments of the call.
    """
    own = private(combination, dtype, device)
    make = getattr(combination, "example", None)
    torch.manual_seed(seed)
    made = torch.randn(count) if make is None else make(count)
    predictions, arguments = made if isinstance(made, tuple) else (made, {})
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return Sample(BoundCombination(own, count, moved), predictions.detach().to(device, dtype))


def private(combination: Any, dtype: torch.dtype = REFERENCE_DTYPE, device: str | torch.device = "cpu") -> Any:
    """A copy that the check may do anything to."""
    own = copy.deepcopy(combination)
    return own.to(device, dtype) if isinstance(own, nn.Module) else own


def parameters(combination: Any) -> dict[str, nn.Parameter]:
    """Its trainable parameters, by name."""
    if not isinstance(combination, nn.Module):
        return {}
    return {name: parameter for name, parameter in combination.named_parameters() if parameter.requires_grad}


class Network(nn.Module):
    """Predicts the example's numbers and something that depends on its parameters.

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
    """A model, and poses for which it predicts about `predictions`, shape `(N, *prediction)`."""
    torch.manual_seed(1)
    network = Network(max(1, predictions[0].numel()))
    return network, [(torch.randn(3, dtype=REFERENCE_DTYPE), row) for row in predictions]


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected number, or to 1 where all are smaller; infinite if either is not finite."""
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    size = max(1.0, expected.abs().max().item())
    return (found.to(expected) - expected).abs().max().item() / size

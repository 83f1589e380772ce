"""Checks of a combination at work: training a small model with it."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.accumulators import Auto, Recompute, Store, Stream
from gradhooks.combination import BoundCombination, GradientCombination
from gradhooks.errors import GradhooksWarning
from gradhooks.prediction import MultiPosePrediction
from gradhooks.testing.errors import CheckFailed, named
from gradhooks.testing.inputs import Network, largest_difference, network_and_poses, parameters, sample
from gradhooks.testing.reference import full_graph
from gradhooks.wrapper import MultiPose

EXACT = 1e-10
LOSSES = {
    "the combined prediction": lambda found: (found.combined - 0.3).square().sum(),
    "the pose predictions": lambda found: found.per_pose.tanh().square().sum(),
    "both": lambda found: (found.combined - 0.3).square().sum() + found.per_pose.tanh().square().sum(),
}

Gradients = dict[str, Tensor]


@named
def check_training(combination: Any) -> None:
    """Through every accumulator, model and combination get the gradients of the full graph."""
    accumulators = (Store, Auto) if _works_on_gradients(combination) else (Store, Stream, Recompute, Auto)
    for loss in LOSSES:
        expected = _by_full_graph(combination, loss)
        for accumulator in accumulators:
            found = _by_group(combination, loss, accumulator())
            for name, gradient in expected.items():
                difference = largest_difference(found[name], gradient)
                if not difference <= EXACT:
                    raise CheckFailed(
                        f"trained {name} by the accumulator {accumulator.name!r} with a loss of {loss} to a gradient "
                        f"that is {difference:.2g} off the full graph's; does forward depend on anything but the "
                        "predictions and the arguments of the call?"
                    )


def _works_on_gradients(combination: Any) -> bool:
    return getattr(combination, "combine_gradients", None) is not None


def _by_group(combination: Any, loss: str, accumulator: Any) -> Gradients:
    given = sample(combination, 5)
    network, poses = network_and_poses(given.predictions)
    scorer = MultiPose(network, given.bound.combination, accumulator=accumulator)
    with warnings.catch_warnings():
        # A declaration that does not explain the coefficients is for check_stream_declaration to refuse.
        warnings.simplefilter("ignore", GradhooksWarning)
        LOSSES[loss](scorer(poses, **given.bound.arguments)).backward()
    return _gradients(network, given.bound.combination)


def _by_full_graph(combination: Any, loss: str) -> Gradients:
    given = sample(combination, 5)
    network, poses = network_and_poses(given.predictions)
    prediction = full_graph(network, poses, given.bound)
    if not _works_on_gradients(combination):
        LOSSES[loss](prediction).backward()
        return _gradients(network, given.bound.combination)
    delivered = _combined_gradients(given.bound, network, prediction, loss)
    return {f"model parameter {name!r}": gradient for name, gradient in delivered.items()}


def _combined_gradients(
    bound: BoundCombination, network: Network, prediction: MultiPosePrediction, loss: str
) -> Mapping[str, Tensor]:
    leaves = dict(network.named_parameters())
    value = LOSSES[loss](prediction)
    (coefficients,) = torch.autograd.grad(value, prediction.per_pose, retain_graph=True)
    rows = [torch.autograd.grad(row, list(leaves.values()), retain_graph=True) for row in prediction.per_pose]
    stacks = {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}
    return bound.combination.combine_gradients(stacks, prediction.per_pose.detach(), coefficients)  # type: ignore[attr-defined, no-any-return]


def _gradients(network: nn.Module, combination: Any) -> Gradients:
    of_model = {f"model parameter {name!r}": leaf.grad for name, leaf in network.named_parameters()}
    of_combination = {f"its parameter {name!r}": leaf.grad for name, leaf in parameters(combination).items()}
    return {
        name: torch.zeros(()) if gradient is None else gradient
        for name, gradient in {**of_model, **of_combination}.items()
    }


@named
def check_combined_gradients(combination: Any) -> None:
    """`combine_gradients` returns a finite gradient for every name, also of zeros and of one pose."""
    if not _works_on_gradients(combination):
        return
    if not isinstance(combination, GradientCombination):
        raise CheckFailed("defines combine_gradients, but is no subclass of gradhooks.GradientCombination; make it one")
    for count in (1, 4):
        given = sample(combination, count)
        random = {"inner.weight": torch.randn(count, 3, 2).double(), "inner.bias": torch.randn(count).double()}
        zeros = {name: torch.zeros_like(gradient) for name, gradient in random.items()}
        for kind, gradients in {"random gradients": random, "gradients that are zero": zeros}.items():
            kept = {name: gradient.clone() for name, gradient in gradients.items()}
            found = given.bound.combination.combine_gradients(  # type: ignore[attr-defined]
                gradients, given.predictions, torch.linspace(0, 1, count).double()
            )
            _check_delivered(found, kept, f"{kind} of {count} poses")


def _check_delivered(found: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    if set(found) != set(given):
        raise CheckFailed(
            f"combine_gradients returned {sorted(found)} for {what} called {sorted(given)}; keep the names"
        )
    for name, gradient in found.items():
        if gradient.shape != given[name].shape[1:]:
            raise CheckFailed(
                f"combine_gradients returned shape {tuple(gradient.shape)} for {what} of shape "
                f"{tuple(given[name].shape)}; reduce axis 0"
            )
        if not gradient.isfinite().all():
            raise CheckFailed(
                f"combine_gradients returned {gradient} for {what}; does it divide by a norm that can be 0?"
            )


CHECKS = (
    check_training,
    check_combined_gradients,
)

"""Checks of a combination in training: gradients of a small model agree with the full graph."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.accumulators import Auto, Recompute, Store, Stream
from gradhooks.combination import GradientCombination
from gradhooks.errors import GradhooksWarning
from gradhooks.prediction import MultiPosePrediction
from gradhooks.testing.errors import CheckFailed, conformance_check
from gradhooks.testing.inputs import Network, largest_difference, make_sample, network_and_poses, trainable_parameters
from gradhooks.testing.reference import full_graph
from gradhooks.wrapper import MultiPose

TRAINING_TOLERANCE = 1e-10

LOSSES: dict[str, Callable[[MultiPosePrediction], Tensor]] = {
    "the combined prediction": lambda prediction: (prediction.combined - 0.3).square().sum(),
    "the pose predictions": lambda prediction: prediction.per_pose.tanh().square().sum(),
    "both": lambda prediction: (prediction.combined - 0.3).square().sum() + prediction.per_pose.tanh().square().sum(),
}

Gradients = dict[str, Tensor]


@conformance_check
def check_training(combination: Any) -> None:
    """With every accumulator, model and combination get the gradients of the full graph."""
    accumulators = (Store, Auto) if _combines_gradients(combination) else (Store, Stream, Recompute, Auto)
    for loss in LOSSES:
        expected = _gradients_of_full_graph(combination, loss)
        for accumulator in accumulators:
            result = _gradients_of_group(combination, loss, accumulator())
            for name, gradient in expected.items():
                difference = largest_difference(result[name], gradient)
                if not difference <= TRAINING_TOLERANCE:
                    raise CheckFailed(
                        f"has a gradient of {name} that differs from the full graph's by {difference:.2g}, with the "
                        f"accumulator {accumulator.name!r} and a loss of {loss}; does forward depend on anything but "
                        "the predictions and the arguments of the call?"
                    )


def _combines_gradients(combination: Any) -> bool:
    return getattr(combination, "combine_gradients", None) is not None


def _gradients_of_group(combination: Any, loss: str, accumulator: Any) -> Gradients:
    sample = make_sample(combination, 5)
    network, poses = network_and_poses(sample.predictions)
    scorer = MultiPose(network, sample.combination, accumulator=accumulator)
    with warnings.catch_warnings():
        # A declaration that does not explain the coefficients is refused by check_stream_declaration.
        warnings.simplefilter("ignore", GradhooksWarning)
        LOSSES[loss](scorer(poses, **sample.bound.arguments)).backward()
    return _gradients(network, sample.combination)


def _gradients_of_full_graph(combination: Any, loss: str) -> Gradients:
    sample = make_sample(combination, 5)
    network, poses = network_and_poses(sample.predictions)
    prediction = full_graph(network, poses, sample.bound)
    if not _combines_gradients(combination):
        LOSSES[loss](prediction).backward()
        return _gradients(network, sample.combination)
    combined = _combined_gradients(sample.combination, network, prediction, loss)
    return {f"the model parameter {name!r}": gradient for name, gradient in combined.items()}


def _combined_gradients(
    combination: Any, network: Network, prediction: MultiPosePrediction, loss: str
) -> Mapping[str, Tensor]:
    """Apply `combine_gradients` to the gradients of the poses in the full graph."""
    leaves = dict(network.named_parameters())
    value = LOSSES[loss](prediction)
    (coefficients,) = torch.autograd.grad(value, prediction.per_pose, retain_graph=True)
    rows = [torch.autograd.grad(row, list(leaves.values()), retain_graph=True) for row in prediction.per_pose]
    stacks = {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}
    combined: Mapping[str, Tensor] = combination.combine_gradients(stacks, prediction.per_pose.detach(), coefficients)
    return combined


def _gradients(network: nn.Module, combination: Any) -> Gradients:
    of_model = {f"the model parameter {name!r}": leaf.grad for name, leaf in network.named_parameters()}
    own = {f"its own parameter {name!r}": leaf.grad for name, leaf in trainable_parameters(combination).items()}
    return {name: torch.zeros(()) if gradient is None else gradient for name, gradient in {**of_model, **own}.items()}


@conformance_check
def check_combined_gradients(combination: Any) -> None:
    """`combine_gradients` returns a finite gradient for every name, also for zeros and for one pose."""
    if not _combines_gradients(combination):
        return
    if not isinstance(combination, GradientCombination):
        raise CheckFailed(
            "defines combine_gradients, but is not a subclass of gradhooks.GradientCombination; derive it from that"
        )
    for count in (1, 4):
        sample = make_sample(combination, count)
        random = {"inner.weight": torch.randn(count, 3, 2).double(), "inner.bias": torch.randn(count).double()}
        zeros = {name: torch.zeros_like(gradient) for name, gradient in random.items()}
        for kind, gradients in {"random gradients": random, "gradients of zeros": zeros}.items():
            originals = {name: gradient.clone() for name, gradient in gradients.items()}
            result = sample.combination.combine_gradients(
                gradients, sample.predictions, torch.linspace(0, 1, count).double()
            )
            _check_combined(result, originals, f"{kind} of {count} poses")


def _check_combined(result: Mapping[str, Tensor], gradients: Mapping[str, Tensor], kind: str) -> None:
    if set(result) != set(gradients):
        raise CheckFailed(
            f"returned {sorted(result)} from combine_gradients for {kind} named {sorted(gradients)}; keep the names"
        )
    for name, gradient in result.items():
        if gradient.shape != gradients[name].shape[1:]:
            raise CheckFailed(
                f"returned shape {tuple(gradient.shape)} from combine_gradients for {kind} of shape "
                f"{tuple(gradients[name].shape)}; reduce axis 0"
            )
        if not gradient.isfinite().all():
            raise CheckFailed(
                f"returned {gradient} from combine_gradients for {kind}; does it divide by a norm that can be 0?"
            )


CHECKS = (
    check_training,
    check_combined_gradients,
)

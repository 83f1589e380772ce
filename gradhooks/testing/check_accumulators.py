"""Checks of an accumulator: its gradients agree with the full graph."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.combinations import Boltzmann, Max, Mean
from gradhooks.testing.check_training import LOSSES, TRAINING_TOLERANCE
from gradhooks.testing.errors import CheckFailed, conformance_check
from gradhooks.testing.inputs import REFERENCE_DTYPE, largest_difference
from gradhooks.testing.reference import full_graph
from gradhooks.wrapper import MultiPose

COMBINATIONS: tuple[Callable[[], nn.Module], ...] = (Mean, Max, lambda: Boltzmann(0.7, learnable=True))


class Trunk(nn.Module):
    """A model with a frozen, a tied and an unused parameter."""

    def __init__(self, outputs: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=REFERENCE_DTYPE)
        self.frozen = nn.Linear(3, 3, dtype=REFERENCE_DTYPE).requires_grad_(False)
        self.outer = nn.Linear(3, outputs, dtype=REFERENCE_DTYPE)
        self.unused = nn.Parameter(torch.ones(2, dtype=REFERENCE_DTYPE))
        self.dropout = nn.Dropout(dropout)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.inner(self.frozen(self.inner(pose).tanh())).tanh()
        prediction: Tensor = self.outer(self.dropout(hidden))
        return prediction.squeeze(-1)


def _trunk_and_poses(count: int = 6, outputs: int = 1, dropout: float = 0.0) -> tuple[Trunk, Tensor]:
    torch.manual_seed(2)
    return Trunk(outputs, dropout), torch.randn(count, 3, dtype=REFERENCE_DTYPE)


def _compare(accumulator: Any, loss: str, combination: nn.Module, passes: int = 1, **options: Any) -> None:
    """Train two copies of a model, one of them with the full graph, and compare all gradients."""
    trunk, poses = _trunk_and_poses(**options)
    expected_trunk, expected_combination = copy.deepcopy(trunk), copy.deepcopy(combination)
    torch.manual_seed(3)
    expected = LOSSES[loss](full_graph(expected_trunk, poses, expected_combination))
    torch.manual_seed(3)
    result = LOSSES[loss](MultiPose(trunk, combination, accumulator=copy.deepcopy(accumulator))(list(poses)))
    if any(parameter.grad is not None for parameter in trunk.parameters()):
        raise CheckFailed("changed .grad before the loss was known; return gradients from Accumulation.gradients only")
    for remaining in range(passes - 1, -1, -1):
        expected.backward(retain_graph=remaining > 0)
        result.backward(retain_graph=remaining > 0)
    condition = f"with a loss of {loss} and the combination {type(combination).__name__}"
    _compare_gradients(trunk, expected_trunk, condition)
    _compare_gradients(combination, expected_combination, condition)


def _compare_gradients(result: nn.Module, expected: nn.Module, condition: str) -> None:
    for (name, one), other in zip(result.named_parameters(), expected.parameters(), strict=True):
        if (one.grad is None) != (other.grad is None):
            raise CheckFailed(
                f"{condition}: .grad of {name!r} is {'None' if one.grad is None else 'a tensor'}, but "
                f"{'None' if other.grad is None else 'a tensor'} in the full graph; return None from "
                "Accumulation.gradients for exactly the leaves that no pose reaches"
            )
        if one.grad is None or other.grad is None:
            continue
        difference = largest_difference(one.grad, other.grad)
        if not difference <= TRAINING_TOLERANCE:
            raise CheckFailed(
                f"{condition}: the gradient of {name!r} differs from the full graph's by {difference:.2g}; "
                "Accumulation.gradients must return sum_i coefficients.total[i] * dy_i/dtheta for each leaf"
            )


@conformance_check
def check_every_loss(accumulator: Any) -> None:
    """Losses of the combined prediction, of the pose predictions and of both give the gradients of the full graph."""
    for make in COMBINATIONS:
        for loss in LOSSES:
            _compare(accumulator, loss, make().to(REFERENCE_DTYPE))


@conformance_check
def check_group_of_one(accumulator: Any) -> None:
    """A group of one pose gives the gradients of the full graph."""
    for make in COMBINATIONS:
        _compare(accumulator, "both", make().to(REFERENCE_DTYPE), count=1)


@conformance_check
def check_vector_predictions(accumulator: Any) -> None:
    """Predictions of several numbers give the gradients of the full graph."""
    _compare(accumulator, "both", Boltzmann(0.7), outputs=3)


@conformance_check
def check_dropout(accumulator: Any) -> None:
    """A model with dropout draws the same random numbers as in the full graph, also in a second run of a pose."""
    _compare(accumulator, "both", Boltzmann(0.7), dropout=0.5)


@conformance_check
def check_backward_twice(accumulator: Any) -> None:
    """After `backward(retain_graph=True)`, a second backward adds the same gradients again."""
    for make in COMBINATIONS:
        _compare(accumulator, "both", make().to(REFERENCE_DTYPE), passes=2)


@conformance_check
def check_several_groups(accumulator: Any) -> None:
    """The gradients of a group do not depend on earlier groups."""
    own = copy.deepcopy(accumulator)
    trunk, poses = _trunk_and_poses()
    scorer = MultiPose(trunk, Max(2.0), accumulator=own)
    for number in range(4):
        trunk.zero_grad()
        expected_trunk = copy.deepcopy(trunk)
        group = poses + 0.1 * number
        LOSSES["the combined prediction"](scorer(list(group))).backward()
        LOSSES["the combined prediction"](full_graph(expected_trunk, group, Max(2.0))).backward()
        _compare_gradients(trunk, expected_trunk, f"in group {number} of one MultiPose")


@conformance_check
def check_leaves_no_trace(accumulator: Any) -> None:
    """The model has its own parameters and no additional hooks afterwards, also if a pose raises in mid-group."""
    trunk, poses = _trunk_and_poses()
    parameters = dict(trunk.named_parameters())
    scorer = MultiPose(trunk, Mean(), accumulator=copy.deepcopy(accumulator))
    scorer(list(poses)).combined.backward()
    with contextlib.suppress(RuntimeError):  # the last pose has the wrong shape
        scorer([*poses[:2], torch.randn(7, dtype=REFERENCE_DTYPE)])
    if any(dict(trunk.named_parameters())[name] is not parameter for name, parameter in parameters.items()):
        raise CheckFailed("left other parameters in the model than it had before")
    if any(parameter._post_accumulate_grad_hooks for parameter in parameters.values()):
        raise CheckFailed("left hooks on the model's parameters; remove them in Accumulation.close")


CHECKS = (
    check_every_loss,
    check_group_of_one,
    check_vector_predictions,
    check_dropout,
    check_backward_twice,
    check_several_groups,
    check_leaves_no_trace,
)

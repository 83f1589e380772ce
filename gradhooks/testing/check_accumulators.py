"""Checks of an accumulator: the gradients it delivers are the full graph's."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.combinations import Boltzmann, Max, Mean
from gradhooks.testing.check_training import EXACT, LOSSES
from gradhooks.testing.errors import CheckFailed, named
from gradhooks.testing.inputs import REFERENCE_DTYPE, largest_difference
from gradhooks.testing.reference import full_graph
from gradhooks.wrapper import MultiPose

COMBINATIONS: tuple[Callable[[], nn.Module], ...] = (Mean, Max, lambda: Boltzmann(0.7, learnable=True))


class Trunk(nn.Module):
    """Has a frozen, a tied and an unused parameter."""

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
    """Train two twins, one by the full graph, and compare all their gradients."""
    trunk, poses = _trunk_and_poses(**options)
    twin, other = copy.deepcopy(trunk), copy.deepcopy(combination)
    torch.manual_seed(3)
    expected = LOSSES[loss](full_graph(twin, poses, other))
    torch.manual_seed(3)
    found = LOSSES[loss](MultiPose(trunk, combination, accumulator=copy.deepcopy(accumulator))(list(poses)))
    if any(parameter.grad is not None for parameter in trunk.parameters()):
        raise CheckFailed(
            "left something in .grad before the loss was known; deliver gradients from Accumulation.gradients alone"
        )
    for last in range(passes - 1, -1, -1):
        expected.backward(retain_graph=last > 0)
        found.backward(retain_graph=last > 0)
    what = f"with a loss of {loss} of the combination {type(combination).__name__}"
    _compare_gradients(trunk, twin, what)
    _compare_gradients(combination, other, what)


def _compare_gradients(found: nn.Module, expected: nn.Module, what: str) -> None:
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        if (one.grad is None) != (other.grad is None):
            raise CheckFailed(
                f"{what}: the .grad of {name!r} is {'None' if one.grad is None else 'there'}, that of the full graph "
                f"{'None' if other.grad is None else 'is there'}; return None for leaves that no pose reaches"
            )
        if one.grad is None or other.grad is None:
            continue
        difference = largest_difference(one.grad, other.grad)
        if not difference <= EXACT:
            raise CheckFailed(
                f"{what}: the gradient of {name!r} is {difference:.2g} off the full graph's; Accumulation.gradients must "
                "return sum_i coefficients.total[i] * dy_i/dtheta for each leaf"
            )


@named
def check_every_loss(accumulator: Any) -> None:
    """Losses of the combined prediction, of the poses and of both train as the full graph does."""
    for make in COMBINATIONS:
        for loss in LOSSES:
            _compare(accumulator, loss, make().to(REFERENCE_DTYPE))


@named
def check_group_of_one(accumulator: Any) -> None:
    """A group of one pose trains as the full graph does."""
    for make in COMBINATIONS:
        _compare(accumulator, "both", make().to(REFERENCE_DTYPE), count=1)


@named
def check_vector_predictions(accumulator: Any) -> None:
    """Predictions of several numbers train as the full graph does."""
    _compare(accumulator, "both", Boltzmann(0.7), outputs=3)


@named
def check_dropout(accumulator: Any) -> None:
    """A model that draws random numbers draws the same as in the full graph, also where it is run again."""
    _compare(accumulator, "both", Boltzmann(0.7), dropout=0.5)


@named
def check_backward_twice(accumulator: Any) -> None:
    """`backward(retain_graph=True)` can be followed by another one, which adds the same gradients."""
    for make in COMBINATIONS:
        _compare(accumulator, "both", make().to(REFERENCE_DTYPE), passes=2)


@named
def check_several_groups(accumulator: Any) -> None:
    """What it learned of earlier groups changes no later gradient."""
    own = copy.deepcopy(accumulator)
    trunk, poses = _trunk_and_poses()
    scorer = MultiPose(trunk, Max(2.0), accumulator=own)
    for number in range(4):
        trunk.zero_grad()
        twin = copy.deepcopy(trunk)
        group = poses + 0.1 * number
        LOSSES["the combined prediction"](scorer(list(group))).backward()
        LOSSES["the combined prediction"](full_graph(twin, group, Max(2.0))).backward()
        _compare_gradients(trunk, twin, f"group {number} of one MultiPose")


@named
def check_leaves_no_trace(accumulator: Any) -> None:
    """Parameters and hooks of the model are as before, also where a pose raised in the middle of a group."""
    trunk, poses = _trunk_and_poses()
    parameters = dict(trunk.named_parameters())
    scorer = MultiPose(trunk, Mean(), accumulator=copy.deepcopy(accumulator))
    scorer(list(poses)).combined.backward()
    with contextlib.suppress(RuntimeError):  # the last pose does not fit, on purpose
        scorer([*poses[:2], torch.randn(7, dtype=REFERENCE_DTYPE)])
    if any(dict(trunk.named_parameters())[name] is not parameter for name, parameter in parameters.items()):
        raise CheckFailed("left other parameters in the model than were there before")
    if any(parameter._post_accumulate_grad_hooks for parameter in parameters.values()):
        raise CheckFailed("left hooks on the model's parameters; take them off when the group is closed")


CHECKS = (
    check_every_loss,
    check_group_of_one,
    check_vector_predictions,
    check_dropout,
    check_backward_twice,
    check_several_groups,
    check_leaves_no_trace,
)

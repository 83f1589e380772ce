"""Find out by a trial whether a pooling module may get all groups of a batch at once.

A mask says nothing about what a module does with it: DSMIL looks for its critical instance among the padding, too, and
an LSTM reads it. So random groups of unequal size go through a copy of the module in float64, all at once and one by
one, and both ways must give the same results and derivatives.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from gradhooks.combinations.pooling_module import CallArguments, ModuleOutput
from gradhooks.combined import Combined, Output, join_groups, result_of
from gradhooks.group_index import GroupIndex
from gradhooks.random_state import default_source, global_sources

GROUPS = (2, 0, 1, 2, 1, 0, 2, 1, 2)
"""Groups of 2, 3 and 4 poses, interleaved."""
COUNT = 3


@dataclass(frozen=True)
class Trial:
    """What a trial has shown.

    Attributes:
        together: Whether the module may get all groups of a batch at once.
        axes: The axis of the poses in each tensor that the module returns beside its result, 0 for none; empty if the
            trial failed.
        reason: Why it may not.
    """

    together: bool
    axes: tuple[int, ...] = ()
    reason: str = ""


class GroupPooling(Protocol):
    """What a trial needs of a `Pooling`."""

    takes_groups: bool
    mask: str | None

    def call_for_group(self, predictions: Tensor, arguments: CallArguments) -> ModuleOutput:
        """Call the module for one group."""

    def forward_alone(self, predictions: Tensor, arguments: CallArguments, axes: Sequence[int]) -> Tensor | Combined:
        """Combine one group."""

    def forward_together(
        self, predictions: Tensor, groups: Tensor, count: int, arguments: CallArguments, axes: Sequence[int]
    ) -> Tensor | Combined:
        """Combine all groups in one call of the module."""


def try_groups(pooling: GroupPooling, predictions: Tensor, arguments: CallArguments) -> Trial:
    """Try both ways on a copy of `pooling`; neither its state nor that of a random generator changes.

    Args:
        pooling: The `Pooling`.
        predictions: Those of the user, shape `(M, *prediction)`; only shape and device matter.
        arguments: Keyword arguments of the user's call.
    """
    device = predictions.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    with _plain_settings(device), torch.inference_mode(False), torch.enable_grad():
        rows = torch.randn(len(GROUPS), *predictions.shape[1:], dtype=dtype, generator=torch.Generator().manual_seed(0))
        values = {name: _of_trial(value, name in arguments.names, dtype) for name, value in arguments.values.items()}
        try:
            twin: Any = copy.deepcopy(pooling)
            return _compare(twin.to(dtype), rows.to(device), CallArguments(values, arguments.names))
        except Exception as error:  # whatever it is, one call for each group is right, or raises it again
            return Trial(together=False, reason=f"{type(error).__name__}: {error}")


def _of_trial(argument: Any, has_rows: bool, dtype: torch.dtype) -> Any:
    """Return an argument of the user's call for the poses of the trial: its own rows, again and again if too few."""
    if not isinstance(argument, Tensor):
        return argument
    if has_rows:
        argument = argument[torch.arange(len(GROUPS), device=argument.device) % max(1, len(argument))]
    return (argument.to(dtype) if argument.is_floating_point() else argument).clone()


def pose_axes(outputs: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the axis of the poses in each tensor that a module returned beside its result.

    Args:
        outputs: For each group, the tensors, each of shape `(1, ...)`.
        sizes: The number of poses of each group.

    Returns:
        For each tensor 1, or -1 for the last axis, whose length is the number of poses in every group; 0 for none.
    """
    axes = []
    for column in zip(*outputs, strict=True):
        pairs = list(zip(column, sizes, strict=True))
        if all(tensor.dim() > 1 and tensor.shape[1] == size for tensor, size in pairs):
            axes.append(1)
        else:
            axes.append(-1 if all(tensor.dim() > 1 and tensor.shape[-1] == size for tensor, size in pairs) else 0)
    return tuple(axes)


def _compare(pooling: GroupPooling, rows: Tensor, arguments: CallArguments) -> Trial:
    groups = GroupIndex(torch.tensor(GROUPS), COUNT)

    def each(predictions: Tensor) -> list[tuple[Tensor, CallArguments]]:
        return [
            (part, arguments.map_rows(lambda value, number=number: groups.split(value)[number]))  # type: ignore[misc]
            for number, part in enumerate(groups.split(predictions))
        ]

    axes = pose_axes([pooling.call_for_group(*group).others for group in each(rows)], groups.sizes)
    if not (pooling.takes_groups or pooling.mask):
        return Trial(together=False, axes=axes, reason="its module takes neither groups nor a mask")
    leaf = rows.requires_grad_()
    alone = join_groups([pooling.forward_alone(*group, axes) for group in each(leaf)], groups)
    together = pooling.forward_together(leaf, groups.to(rows.device), COUNT, arguments, axes)
    difference = _first_difference(_tensors(alone, leaf), _tensors(together, leaf))
    return Trial(together=not difference, axes=axes, reason=difference)


def _tensors(combined: Tensor | Combined, leaf: Tensor) -> dict[str, Output]:
    """Return all that a combination returned, and the derivatives of its result by the predictions."""
    result = result_of(combined)
    cotangents = torch.linspace(0.5, 2, result.numel(), dtype=result.dtype, device=result.device).view_as(result)
    # Without grad_outputs=, for which PyTorch imports sympy.
    (gradient,) = torch.autograd.grad((result * cotangents).sum(), leaf, materialize_grads=True)
    named: dict[str, Output] = {"result": result, "derivative of the result": gradient}
    outputs = (*combined.per_pose, *combined.per_group) if isinstance(combined, Combined) else ()
    return {**named, **{f"output {number}": output for number, output in enumerate(outputs, 1)}}


def _first_difference(alone: Mapping[str, Output], together: Mapping[str, Output]) -> str:
    for name, one in alone.items():
        other = together.get(name)
        same_form = isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
        if not (same_form and _close(one, other)):  # type: ignore[arg-type]
            return f"the {name} of a group depends on the other groups, on the padding, or on chance"
    return ""


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = torch.finfo(one.dtype).eps ** 0.6
    size = float(one.detach().abs().nan_to_num().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)


@contextmanager
def _plain_settings(device: torch.device) -> Iterator[None]:
    """Run the block without autocast or compilation, and restore the states of the random generators."""
    sources = [*map(default_source, sorted({torch.device("cpu"), device}, key=str)), *global_sources()]
    states = [source.get() for source in sources]
    try:
        with ExitStack() as stack:
            if is_autocast_available(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            if "torch._dynamo" in sys.modules:  # importing the compiler takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set(state)

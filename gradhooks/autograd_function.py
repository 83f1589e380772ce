"""The one `autograd.Function`: from the real leaves to the predictions of a group."""

from typing import Any

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulation, Coefficients
from gradhooks.engine.context import Group
from gradhooks.errors import HigherOrderError
from gradhooks.numerics import wide


class PosePredictions(torch.autograd.Function):
    """Ties a group's predictions to the real leaves, whose total gradient it delivers in one piece.

    The predictions come out twice: one tensor feeds the combination, the other goes to the user, so that the
    coefficients arrive apart.

    The leaves are saved although no formula needs them. Autograd then refuses a backward after they were changed in
    place, as it refuses one through the full graph.
    """

    @staticmethod
    def forward(
        ctx: Any, group: Group, accumulation: Accumulation, predictions: Tensor, *real: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.accumulation, ctx.predictions, ctx.leaves = (
            group,
            accumulation,
            predictions[group.share.own],
            len(real),
        )
        ctx.save_for_backward(*real, *accumulation.close(ctx.predictions))
        return predictions.to(wide(predictions.dtype), copy=True), predictions.clone()

    @staticmethod
    def backward(ctx: Any, through_combination: Tensor | None, direct: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise HigherOrderError(
                "create_graph=True asks for derivatives of a gradient that gradhooks has accumulated, and whose graph "
                "is gone; use the full graph for this step (call the bare model on each pose), or drop create_graph"
            )
        kept = ctx.saved_tensors[ctx.leaves :]  # raises if they are freed, or changed in place
        nothing = (None,) * (3 + ctx.leaves)
        if through_combination is None:
            if direct is None:
                return nothing
            through_combination = torch.zeros_like(direct)
        coefficients = Coefficients(through_combination, None if direct is None else direct.to(through_combination))
        group, last = ctx.group, not _keeps_graph()

        def of_own_poses(own: Coefficients) -> list[Tensor | None]:
            gradients: list[Tensor | None] = ctx.accumulation.gradients(kept, own, last=last)
            for listener in group.finished:
                listener(group, ctx.predictions, own)
            return gradients

        if group.share.ranks.alone:
            gradients = of_own_poses(coefficients)
        else:
            own = coefficients.of(group.share.own)
            leaves = group.shadows.leaves
            gradients = group.share.total_gradients(lambda: of_own_poses(own), coefficients.total, leaves)
        if last:
            ctx.group = ctx.accumulation = None  # the user may keep the loss, and need not keep the poses with it
        typed = (
            None if gradient is None else gradient.to(real.dtype)
            for gradient, real in zip(gradients, group.shadows.real, strict=True)
        )
        return (None, None, None, *typed)


def tied_to_leaves(group: Group, accumulation: Accumulation, predictions: Tensor) -> tuple[Tensor, Tensor]:
    """The predictions as part of autograd's graph: for the combination, float32 or wider, and for the user."""
    through_combination, direct = PosePredictions.apply(group, accumulation, predictions, *group.shadows.real)
    return through_combination, direct


def _keeps_graph() -> bool:
    # Not public; where it is missing nothing is overwritten, which costs a copy of the gradients and is right.
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())

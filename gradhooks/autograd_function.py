"""PosePredictions: the one `autograd.Function`, from the real parameters to the predictions of intercepted poses."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gradhooks.engine.accumulation import Accumulation, Coefficients
from gradhooks.engine.context import ForwardContext
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.leaf_versions import leaf_versions, refuse_changed_leaves
from gradhooks.engine.recovery import leaves_no_trace
from gradhooks.engine.shared_memory import SharedMemory
from gradhooks.errors import HigherOrderError
from gradhooks.numerics import at_least_float32


class PosePredictions(torch.autograd.Function):
    """Attaches the predictions of intercepted poses to the real leaves, and delivers their gradient in the backward.

    The predictions are returned twice: one tensor goes to the combination, the other to the user, so that the two parts
    of each coefficient arrive separately. Without a combination only the user's is returned, without a copy: if the
    accumulator saves the predictions, they share their memory.

    If leaves are changed in place between forward and backward, the usual error of autograd is raised, although no
    formula needs them (`leaf_versions.py`).
    """

    @staticmethod
    def forward(
        ctx: Any, context: ForwardContext, accumulation: Accumulation, predictions: Tensor, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.context, ctx.accumulation, ctx.leaf_count = context, accumulation, len(leaves)
        ctx.versions = leaf_versions(context)
        own = predictions[context.partition.rows]
        kept = accumulation.close(own)
        ctx.held = context.batch.open_graphs.hold(sum(tensor.nbytes for tensor in kept if not tensor.is_sparse))
        ctx.save_for_backward(predictions.new_empty(0), *kept)  # at least one tensor, to see that the graph was freed
        ctx.shared = None
        if context.batch.combination.combination is None:
            for_user = predictions.data  # has a version of its own, so the user may change it in place
            shares = [tensor is own for tensor in kept]
            if any(shares):
                ctx.shared = SharedMemory(for_user.detach(), shares)
            return (for_user,)
        return predictions.to(at_least_float32(predictions.dtype), copy=True), predictions.clone()

    @staticmethod
    def backward(ctx: Any, *received: Tensor | None) -> Any:
        coefficients = _coefficients(*received)
        if coefficients is None:
            return (None,) * (3 + ctx.leaf_count)
        context, last = ctx.context, not _keeps_graph()
        if context is None:
            _ = ctx.saved_tensors  # raises, since they are freed
        gradients = _total_gradients(_Backward(context), ctx, coefficients, last=last)
        if last:
            ctx.context = ctx.accumulation = ctx.shared = None  # frees the poses, although the user may keep the loss
            ctx.held.release()
        typed = (
            gradient if gradient is None or gradient.dtype == leaf.dtype else gradient.to(leaf.dtype)
            for gradient, leaf in zip(gradients, context.leaves.real, strict=True)
        )
        return (None, None, None, *typed)


class _Backward:
    """The outer backward of intercepted poses, which may raise."""

    def __init__(self, context: ForwardContext) -> None:
        self.context = context

    def begin(self) -> None:
        self.context.batch.parts.state.forget_before()

    def recover(self) -> None:
        self.context.leaves.hooks.clear()
        self.context.batch.parts.recover()


def _coefficients(through_combination: Tensor | None, direct: Tensor | None = None) -> Coefficients | None:
    """Return what arrived, in float32 or wider; None if nothing did."""
    if through_combination is None:
        if direct is None:
            return None
        through_combination = torch.zeros_like(direct, dtype=at_least_float32(direct.dtype))
    through_combination = through_combination.to(at_least_float32(through_combination.dtype))
    return Coefficients(through_combination, None if direct is None else direct.to(through_combination))


@leaves_no_trace(lambda outer, *_: outer)
def _total_gradients(outer: _Backward, ctx: Any, coefficients: Coefficients, *, last: bool) -> Gradients:
    """Return the total gradient of each leaf, over the poses of all ranks."""
    context = outer.context
    partition, accumulation = context.partition, cast("Accumulation", ctx.accumulation)
    if partition.collectives.is_single:
        return accumulation.gradients(_saved_tensors(ctx), coefficients, last=last)
    local = coefficients.of_rows(partition.rows)
    return partition.sum_gradients(  # also what is refused on one rank stops all ranks
        lambda: accumulation.gradients(_saved_tensors(ctx), local, last=last),
        coefficients.total,
        context.leaves.shadows,
    )


def _saved_tensors(ctx: Any) -> Sequence[Tensor]:
    """Return what the accumulation has saved. Raises if it was freed, or something was changed in place."""
    if torch.is_grad_enabled():
        raise HigherOrderError(
            "create_graph=True asks for derivatives of a gradient that gradhooks has accumulated, and whose graph "
            "is gone; use the full graph for this step (call the bare model on each pose), or drop create_graph"
        )
    saved: Sequence[Tensor] = ctx.saved_tensors[1:]
    refuse_changed_leaves(ctx.context, ctx.versions)
    return saved if ctx.shared is None else cast("SharedMemory", ctx.shared).without_changed(saved)


def attach_to_graph(context: ForwardContext, accumulation: Accumulation, predictions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predictions as part of autograd's graph: in float32 or wider for the combination, and for the user."""
    attached = PosePredictions.apply(context, accumulation, predictions, *context.leaves.real)
    return attached[0], attached[-1]


def _keeps_graph() -> bool:
    # A private function. Where it is missing nothing is overwritten, which costs one copy of the gradients.
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())

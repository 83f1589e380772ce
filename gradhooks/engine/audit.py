"""The audit: run a pose twice from one state, before poses are intercepted for the first time, without a trace.

| question | if not |
|---|---|
| which parts of the state change, and does it show? | they are copied from then on (`model_state.py`) |
| does the prediction depend on registered leaves only? | refused by name (`leaf_validation.py`) |
| is the graph gone when the prediction is? | refused: a side loss, or something memoised |
| does a second run give the same prediction and gradient? | accumulators that run each pose once |
| is the backward linear in its cotangent? | recompute, and no pose is skipped |

The second run has another cotangent, so that it answers the last two questions at once; if it does not agree, a third
run with the first cotangent tells which one. A cotangent is a power of two: a linear backward then agrees to the bit.
"""

import gc
import math
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from gradhooks.engine.accumulation import Chunk
from gradhooks.engine.attribute_recorder import computed_attributes
from gradhooks.engine.batch import Batch
from gradhooks.engine.context import ForwardContext, intercept
from gradhooks.engine.findings import TRUSTED, Findings
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.graph_leaves import reached_leaves
from gradhooks.engine.graph_watch import GraphWatch, describe_holders, describe_places, tensors_with_graph
from gradhooks.engine.hidden_generators import HiddenGenerators
from gradhooks.engine.model_state import Snapshot
from gradhooks.engine.running_sums import RunningSums
from gradhooks.engine.shadow_parameters import ShadowParameters
from gradhooks.errors import OutlivingGraphError

_LARGE, _LARGE_FLOAT16 = -(2.0**10), -(2.0**4)


@dataclass
class _Run:
    """One run of the audited pose.

    Attributes:
        prediction: Shape `(n, *prediction)`, detached.
        gradients: By leaf.
        scale: The cotangent of these gradients.
    """

    prediction: Tensor
    gradients: Gradients
    scale: float


def audit(batch: Batch) -> Findings:
    """Run the first pose of a batch twice, without a trace, and return what follows.

    With a process group, every rank returns what the ranks found out together; a rank without poses takes part.

    Raises:
        OutlivingGraphError: A tensor with a graph outlives the forward.
        UnregisteredTensorError: The prediction depends on a leaf whose gradient cannot be intercepted.
        DistributedError: Another rank raised.
    """
    with (
        batch.sharded.keep_unsharded(),
        batch.sharded.all_or_none("audit") as of_shards,
        batch.partition.collectives.all_or_none("audit") as of_group,
    ):
        findings = _audit_first_pose(batch) if len(batch.poses) else TRUSTED
        of_shards.sent = of_group.sent = [not findings.repeatable, not findings.linear]
    doubts = [*of_shards.received, *of_group.received]
    findings = Findings(repeatable=not any(each[0] for each in doubts), linear=not any(each[1] for each in doubts))
    logger.debug("audit: a second run agrees: {}, the backward is linear: {}", *findings)
    return findings


def _audit_first_pose(batch: Batch) -> Findings:
    state = batch.parts.state
    hidden = HiddenGenerators(batch.model, batch.options.call)
    context = intercept(batch, 0, _least_count(batch), TRUSTED, shadows=ShadowParameters(batch.model))
    large = _LARGE_FLOAT16 if _computes_in_float16(context) else _LARGE
    with torch.enable_grad(), context.on_shadows(), state.preserved(probe=True) as before:
        first = _first_run(context, before)
        state.restore(before)
        state.end_probe()
        drawn = hidden.rewind()
        second = _run(context, before, large)
        agrees = _agree(context, first, second)
        third = None
        if not agrees:
            state.restore(before)
            hidden.rewind()
            third = _run(context, before, 1.0)
    hidden.rewind()
    state.add_generators(drawn)
    if third is None:
        return TRUSTED
    repeatable = _agree(context, first, third)
    return Findings(repeatable=repeatable, linear=not repeatable)


def _least_count(batch: Batch) -> int:
    """Return with how many poses the model runs: one, or a chunk if it needs several (batch normalization)."""
    return min(len(batch.poses), batch.options.chunk_size or 1)


def _first_run(context: ForwardContext, before: Snapshot) -> _Run:
    """Run the pose, and refuse a graph that is left afterwards.

    Raises:
        OutlivingGraphError: One is.
    """
    model, leaves = context.batch.model, context.leaves.shadows
    computed = _Computed(model)
    if context.batch.sharded:
        known = tensors_with_graph()
        run = _run(context, before, 1.0)
        computed.put_back()
        gc.collect()
        left = [tensor for key, tensor in tensors_with_graph().items() if key not in known]
        if left:
            _refuse(context, describe_places(model, left))
        return run
    watch = GraphWatch(leaves)
    run = _run(context, before, 1.0)
    computed.put_back()
    context.shadows.release_nodes()
    if watch.outlived():
        holders = describe_holders(model, leaves)
        watch.expire()
        _refuse(context, holders)
    context.shadows.find_nodes()
    return run


def _refuse(context: ForwardContext, holders: str) -> None:
    raise OutlivingGraphError(
        f"after the forward of pose {context.poses.original_index(0)}, {holders} holds a tensor with a graph. What a "
        "loss reads there would lack the gradient of intercepted poses. If nothing reads it, detach it. If it is a "
        "side loss, return it: call= may return (prediction, side), and the sides of all poses come back as "
        "prediction.side. Or allow enough memory= for poses to run plainly"
    )


def _run(context: ForwardContext, before: Snapshot, scale: float) -> _Run:
    live = context.run(context.poses, Chunk(0, len(context.poses), before))
    prediction = live.detach()
    cotangents = torch.full_like(live, scale)
    if not live.requires_grad:
        return _Run(prediction, [], scale)
    if context.batch.sharded:
        return _Run(prediction, _gradients_on_shards(context, live, cotangents), scale)
    with RunningSums(context.leaves.hooks, count=1) as sums:
        context.backward(live, cotangents)
        return _Run(prediction, sums.take()[0], scale)


def _gradients_on_shards(context: ForwardContext, live: Tensor, cotangents: Tensor) -> Gradients:
    """Return the gradients of the leaves below `live`, without adding them to `.grad`; none if that cannot be done."""
    leaves = reached_leaves(live)[0]
    with context.batch.sharded.without_synchronization(), context.batch.autocast.disabled():
        try:
            return list(torch.autograd.grad(live, leaves, cotangents.to(live), allow_unused=True))
        except RuntimeError as error:  # reentrant checkpoints do not work with autograd.grad
            logger.debug("audit: the backward is not checked: {}", error)
            return []


class _Computed:
    """The attributes that weight and spectral normalization compute anew in each forward, with graphs.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._values: list[tuple[dict[str, Any], str, Any]] = [
            (vars(module), name, vars(module)[name])
            for module in model.modules()
            for name in computed_attributes(module)
            if name in vars(module)
        ]

    def put_back(self) -> None:
        """Put back the values of the time of construction."""
        for attributes, name, value in self._values:
            attributes[name] = value


def _agree(context: ForwardContext, known: _Run, other: _Run) -> bool:
    """Return whether two runs agree but for rounding, and scales. What is not finite is not compared.

    Works in place, since gradients are large: afterwards `known` has the scale of `other`, whose gradients are used up.
    """
    rounding = _rounding(context)
    differences = torch.where(known.prediction.isfinite(), (known.prediction - other.prediction).abs(), 0)
    largest = torch.where(known.prediction.isfinite(), known.prediction, 0).abs().max()
    same_leaves = [gradient is None for gradient in known.gradients] == [
        gradient is None for gradient in other.gradients
    ]
    factor, known.scale = other.scale / known.scale, other.scale
    difference = norm = 0.0
    for expected, gradient in zip(known.gradients, other.gradients, strict=True):
        if expected is not None:
            norm += _norm(expected.mul_(factor)) ** 2
            if gradient is not None:
                difference += _norm(gradient.sub_(expected)) ** 2
    gradients_agree = same_leaves and not difference > rounding * norm
    return bool((differences <= rounding**0.75 * largest).all()) and (gradients_agree or not math.isfinite(norm))


def _norm(gradient: Any) -> float:
    """Return the norm of a gradient, of this rank's part if it is distributed."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return float(torch.linalg.vector_norm(local.to_dense()))


def _rounding(context: ForwardContext) -> float:
    dtypes = {leaf.dtype for leaf in context.leaves.shadows} | set(context.batch.autocast.dtypes)
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex)


def _computes_in_float16(context: ForwardContext) -> bool:
    return torch.float16 in {*context.batch.autocast.dtypes, *(leaf.dtype for leaf in context.leaves.shadows)}

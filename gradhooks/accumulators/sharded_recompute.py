"""ShardedRecompute: recompute for models whose parameters are sharded, by backwards at the real parameters."""

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from gradhooks.accumulators.base import refuse_nonlinear_backward, set_accumulator
from gradhooks.accumulators.recompute import refuse_second_run, significant_poses
from gradhooks.distributed.status import digest
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.drift import refuse_drift
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.graph_leaves import reached_leaves
from gradhooks.engine.pose_engine import PoseEngine
from gradhooks.engine.running_sums import RunningSums


def begin_sharded(engine: PoseEngine, predictions: Tensor) -> Accumulation:
    """Begin a batch whose parameters are sharded over ranks, in place of "auto" or "recompute"."""
    del predictions
    refuse_nonlinear_backward(engine, "recompute on shards")
    if not engine.findings.repeatable:
        refuse_second_run("recompute")
    set_accumulator(engine, "recompute", "the parameters are sharded over ranks, so nothing can replace them")
    return ShardedAccumulation(engine)


class ShardedAccumulation(Accumulation):
    """Runs poses again inside the outer backward, equally many on every rank; only the last backward synchronizes.

    What arrives in the parameters stays there. The gradients that it returns are those of pose inputs.
    """

    keeps_graph = False

    def __init__(self, engine: PoseEngine) -> None:
        self._engine = engine

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        del chunk, predictions

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        return [predictions]

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        del last  # nothing is saved that could be overwritten
        (predictions,) = saved
        context = self._engine.context
        sharded = context.batch.sharded
        jobs = self._jobs(coefficients, self._engine.skip_threshold(predictions.dtype))
        with (
            context.rerunning(),
            sharded.keep_unsharded(),
            sharded.restore_grad_on_error(),
            RunningSums(self._engine, count=1) as sums,
        ):
            second: list[Tensor] = []
            with sharded.all_or_none("backward") as message, sharded.without_synchronization():
                for number, (chunk, cotangents) in enumerate(jobs, 1):
                    context.batch.parts.state.restore(chunk.before)
                    live = context.run(context.poses, chunk)
                    second.append(live.detach())
                    if number < len(jobs):
                        context.backward(live, cotangents)
                indices = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk, _ in jobs])
                refuse_drift(context, indices, torch.cat(second), predictions, packed=False)
                used = sharded.used_parameters(reached_leaves(live)[0])
                message.sent = [digest(used), -digest(used)]
            if message.received[0][0] != -message.received[0][1]:
                sharded.refuse_unequal_use(used)
            with sharded.naming_lost_ranks():
                context.backward(live, cotangents)
            return sums.take()[0]

    def _jobs(self, coefficients: Coefficients, threshold: float) -> list[tuple[Chunk, Tensor]]:
        """Return the chunks to run, last to first, with their cotangents: as many as the rank with the most has."""
        engine = self._engine
        size = reduce(coefficients.total.detach().abs(), "n ... -> n", "max")
        significant = significant_poses(coefficients, threshold)
        needed = [chunk for chunk in engine.chunks if significant[chunk.start : chunk.stop].any()]
        with engine.context.batch.sharded.all_or_none("backward") as message:
            message.sent = [max(1, len(needed))]
        count = int(message.received[0][0])
        # A rank with fewer chunks adds the largest of its other chunks, then repeats one with zero cotangents.
        others = [chunk for chunk in engine.chunks if chunk not in needed]
        others.sort(key=lambda chunk: size[chunk.start : chunk.stop].max().item(), reverse=True)
        chosen = sorted([*needed, *others[: count - len(needed)]], key=lambda chunk: chunk.start, reverse=True)
        jobs = [(chunk, coefficients.total[chunk.start : chunk.stop]) for chunk in chosen]
        chunk, cotangents = jobs[-1]
        padding = [(chunk, torch.zeros_like(cotangents))] * (count - len(jobs))
        poses = sum(chunk.stop - chunk.start for chunk in chosen)
        engine.report.backwards += count
        engine.report.recomputed += poses
        engine.report.skipped = engine.pose_count - poses
        return [*padding, *jobs]

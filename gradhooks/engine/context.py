"""ForwardContext: the intercepted poses of a batch, from its forward to its outer backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gradhooks.distributed.pose_parallel import PosePartition
from gradhooks.engine.accumulation import Chunk
from gradhooks.engine.backward import run_backward
from gradhooks.engine.batch import Batch
from gradhooks.engine.findings import Findings
from gradhooks.engine.leaf_validation import LeafValidator
from gradhooks.engine.leaves import Leaves
from gradhooks.engine.parametrization_cache import refuse_cached_state, uncached_parametrizations
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.shadow_parameters import ShadowParameters
from gradhooks.engine.training_flags import TrainingFlags, with_training_flags


@dataclass(frozen=True)
class ForwardContext:
    """Poses that run on shadow parameters. No part is replaced; what changes belongs to one part each.

    Attributes:
        batch: The batch.
        first: The row of the first of these poses among the predictions of the batch.
        poses: The poses of this process; tensors that require grad are replaced by detached aliases.
        partition: Which of the intercepted poses of all ranks these are.
        shadows: The shadows of the parameters.
        leaves: The tensors at which the backward of each pose ends.
        findings: What the audit found out about the model.
        flags: The training flags of the forward, which the user may have changed when the backward runs.
        validator: Runs the model and refuses leaves without a shadow.
    """

    batch: Batch
    first: int
    poses: Poses
    partition: PosePartition
    shadows: ShadowParameters
    leaves: Leaves
    findings: Findings
    flags: TrainingFlags
    validator: LeafValidator

    def run(self, poses: Poses, chunk: Chunk) -> Tensor:
        """Return the predictions of a chunk of `poses` with their graph."""
        if self.batch.sharded:  # every backward ends at the real parameters, so any leaf will do
            return self.batch.runner.run(poses, chunk.start, chunk.stop)
        return self.validator.run(poses, chunk)

    def backward(self, predictions: Tensor, cotangents: Tensor, *, retain_graph: bool = False) -> None:
        """Run a backward from `predictions` to the leaves, with cotangents of the same shape."""
        if cotangents.dtype != predictions.dtype or cotangents.device != predictions.device:
            cotangents = cotangents.to(predictions, non_blocking=True)
        hooks = self.leaves.hooks
        hooks.intercepting = True
        try:
            with self.batch.autocast.disabled():
                run_backward(predictions, cotangents, retain_graph=retain_graph)
        finally:
            hooks.intercepting = False

    @contextmanager
    def on_shadows(self) -> Iterator[None]:
        """Run the block with the shadows in the model; after an error no hook and no gradient stays on them."""
        with uncached_parametrizations(), self.shadows:
            try:
                yield
            except BaseException:
                self.leaves.hooks.clear()
                raise

    @contextmanager
    def rerunning(self) -> Iterator[None]:
        """Run the block as the forward ran: shadows, grad mode, autocast, training flags. Then restore everything."""
        with (
            self.on_shadows(),
            self.batch.parts.state.preserved(),
            with_training_flags(self.flags),
            torch.enable_grad(),
            self.batch.autocast.restored(),
        ):
            yield


def intercept(
    batch: Batch, start: int, stop: int, findings: Findings, *, shadows: ShadowParameters | None = None
) -> ForwardContext:
    """Return the context in which the poses `start .. stop - 1` of a batch are intercepted.

    Args:
        batch: The batch.
        start: The index of the first pose.
        stop: The index after the last pose.
        findings: What the audit found out about the model.
        shadows: Shadows that replace the parameters in place of those that are kept from batch to batch.

    Raises:
        ReplayError: A parametrization is cached that must not be computed more than once.
    """
    refuse_cached_state(batch.model, batch.parts.state)
    shadows = ShadowParameters(None) if batch.sharded else shadows or batch.parts.shadows
    leaves = Leaves(shadows)
    if batch.sharded and batch.parts.trainable:
        # Without shadows, this leaf makes the predictions part of autograd's graph.
        leaves.shadow_input(torch.zeros((), requires_grad=True))
        # Where parameters are sharded nothing reveals whether the model marks its inputs, so it always gets aliases.
        batch.runner.detach_inputs(leaves)
    is_whole = start == 0 and stop == len(batch.poses)
    poses = (batch.poses if is_whole else batch.poses.narrow(start, stop)).map_tensors(leaves.shadow_input)
    partition = batch.partition if is_whole else PosePartition(batch.partition.collectives, [stop - start])
    return ForwardContext(
        batch=batch,
        first=partition.first + start,
        poses=poses,
        partition=partition,
        shadows=shadows,
        leaves=leaves,
        findings=findings,
        flags=batch.parts.flags,
        validator=LeafValidator(batch.model, batch.runner, leaves, batch.parts.state),
    )

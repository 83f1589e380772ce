"""ForwardContext: the parts of one group, from its forward to its outer backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.distributed.pose_parallel import PosePartition
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.engine.accumulation import Chunk
from gradhooks.engine.autocast import AutocastState
from gradhooks.engine.chunk_sizes import ChunkSizes
from gradhooks.engine.leaf_validation import LeafValidator
from gradhooks.engine.learned import Learned
from gradhooks.engine.model_state import ModelState
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.pose_runner import PoseRunner
from gradhooks.engine.report import Report
from gradhooks.engine.shadow_parameters import ShadowParameters
from gradhooks.engine.training_flags import TrainingFlags, with_training_flags
from gradhooks.options import Options


@dataclass(frozen=True)
class ForwardContext:
    """The parts of one group. None of them is replaced; what changes during the group belongs to one part each.

    Attributes:
        model: The bare model.
        options: The options of this group.
        combination: The combination with the arguments of this call.
        poses: The poses of this process; tensors that require grad are replaced by detached aliases.
        partition: Which of the poses of all ranks these are.
        sharded: How the parameters are sharded, if they are.
        shadows: The leaves at which the backward of each pose ends.
        state: Snapshots of buffers and random state.
        autocast: The autocast settings of the forward.
        flags: The training flags of the forward, which the user may have changed when the backward runs.
        runner: Runs the model.
        validator: Runs the model and refuses leaves without a shadow.
        chunk_sizes: How many poses run at once.
        learned: What earlier groups have shown.
        report: What was done with the poses.
    """

    model: nn.Module
    options: Options
    combination: BoundCombination
    poses: Poses
    partition: PosePartition
    sharded: ShardedModel
    shadows: ShadowParameters
    state: ModelState
    autocast: AutocastState
    flags: TrainingFlags
    runner: PoseRunner
    validator: LeafValidator
    chunk_sizes: ChunkSizes
    learned: Learned
    report: Report

    def run(self, poses: Poses, chunk: Chunk) -> Tensor:
        """Return the predictions of a chunk of `poses` with their graph."""
        if self.sharded:  # every backward ends at the real parameters, so any leaf will do
            return self.runner.run(poses, chunk.start, chunk.stop)
        return self.validator.run(poses, chunk)

    def backward(self, predictions: Tensor, cotangents: Tensor, *, retain_graph: bool = False) -> None:
        """Run a backward from `predictions` to the leaves, with cotangents of the same shape."""
        if cotangents.dtype != predictions.dtype or cotangents.device != predictions.device:
            cotangents = cotangents.to(predictions, non_blocking=True)
        hooks = self.shadows.hooks
        hooks.intercepting = True
        try:
            with self.autocast.disabled():
                torch.autograd.backward(predictions, cotangents, retain_graph=retain_graph)
        finally:
            hooks.intercepting = False

    @contextmanager
    def rerunning(self) -> Iterator[None]:
        """Run the block as the forward ran: shadows, grad mode, autocast, training flags. Then restore everything."""
        with (
            self.shadows,
            self.state.preserved(),
            with_training_flags(self.flags),
            torch.enable_grad(),
            self.autocast.restored(),
        ):
            yield

"""Batch: what one call passes to the engine."""

from dataclasses import dataclass

from torch import nn

from gradhooks.combination import BoundCombination
from gradhooks.distributed.pose_parallel import PosePartition
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.engine.autocast import AutocastState
from gradhooks.engine.learned import Learned, Mode
from gradhooks.engine.model_parts import ModelParts
from gradhooks.engine.open_graphs import OpenGraphs
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.pose_runner import PoseRunner
from gradhooks.engine.report import Report
from gradhooks.engine.schedule import Schedule
from gradhooks.options import Options


@dataclass(frozen=True)
class Batch:
    """One call of `MultiPose`: the poses of all groups, and what they run through.

    Attributes:
        model: The bare model.
        options: The options of this batch.
        combination: The combination with the groups and the arguments of this call.
        poses: The poses of this process.
        partition: Which of the poses of all ranks these are.
        parts: The model's modules, state and shadows.
        sharded: How the parameters are sharded, if they are.
        autocast: The autocast settings of the call.
        mode: What a pose needs, and whether it depends on its chunk, is learned by mode.
        schedule: How many poses run at once, and how many of them plainly.
        runner: Runs the model.
        open_graphs: What earlier batches hold until their backward.
        learned: What earlier batches have shown.
        report: What was done with the poses.
        ranks_audit: Whether a rank that shares poses or shards has not audited the model yet, so that all ranks do.
    """

    model: nn.Module
    options: Options
    combination: BoundCombination
    poses: Poses
    partition: PosePartition
    parts: ModelParts
    sharded: ShardedModel
    autocast: AutocastState
    mode: Mode
    schedule: Schedule
    runner: PoseRunner
    open_graphs: OpenGraphs
    learned: Learned
    report: Report
    ranks_audit: bool = False

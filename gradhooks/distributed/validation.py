"""What several processes cannot do with a group, and the way out."""

import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.errors import CombinationError, DistributedError, PosesError


def _wrappers() -> tuple[type[nn.Module], ...]:
    # Who wraps a model by FSDP has imported it; half a second need not be spent on everybody else.
    sharding = sys.modules.get("torch.distributed.fsdp")
    sharded = () if sharding is None else (sharding.FullyShardedDataParallel,)
    return (DataParallel, DistributedDataParallel, *sharded)


def _in_company(process_group: "dist.ProcessGroup | None") -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


def refuse_synchronized_modules(model: nn.Module) -> None:
    """Refuse a model that is, or holds, a data-parallel wrapper, is inside one, or normalises over several ranks.

    Raises:
        DistributedError: Its gradients would be synchronised once for each pose, or not at all, or would mix those of
            ranks with other coefficients.
    """
    if "_is_replica" in model.__dict__:  # it has no parameters, and would be taken for one that has none to train
        raise DistributedError(
            "this MultiPose is inside torch.nn.DataParallel, which deals out the poses of a group to its replicas; "
            "start one process for each GPU and use DistributedDataParallel(MultiPose(model)). The Trainer of "
            "transformers does so under torchrun or accelerate launch; under plain python it takes DataParallel where "
            "it sees several GPUs (CUDA_VISIBLE_DEVICES=0 shows it one)"
        )
    wrappers = _wrappers()
    for path, module in model.named_modules():
        where = f"module {path!r} of the model" if path else "the model"
        if isinstance(module, nn.SyncBatchNorm) and module.training and _in_company(module.process_group):
            raise DistributedError(
                f"{where} is a SyncBatchNorm, through which gradients of a pose reach other ranks, whose coefficients "
                "are others, and which waits forever for ranks with fewer poses; use BatchNorm, or put the module in "
                "evaluation mode: module.eval()"
            )
        if isinstance(module, wrappers):
            raise DistributedError(
                f"{where} is a {type(module).__name__}, which would synchronise gradients once for each pose; wrap the "
                "bare model in MultiPose, and what synchronises around that: DistributedDataParallel(MultiPose(model))"
            )


def refuse_sharded_parameters(
    sharded: ShardedModel, ranks: Collectives, accumulator: str, *, supports_sharded: bool
) -> None:
    """Refuse what cannot be done with parameters that are spread over ranks.

    Args:
        sharding: How they are spread.
        ranks: Who shares the poses of a group.
        accumulator: What the user has chosen.
        supports_sharded: Whether it may run poses again.

    Raises:
        DistributedError: It may not; or poses are shared as well; or whoever gathers the parameters stands outside.
    """
    if not supports_sharded:
        raise DistributedError(
            f"the parameters of the model are spread over ranks, and the accumulator {accumulator!r} takes gradients "
            "of single poses, which no rank has; use accumulator='auto' or 'recompute'"
        )
    if not ranks.is_single:
        raise DistributedError(
            "the parameters of the model are spread over ranks, each of which must have groups of its own: use "
            "MultiPose without process_group, or a model that is whole on each rank"
        )
    if sharded.fsdp_root_is_outside:
        raise DistributedError(
            "fully_shard stands around MultiPose, and around modules inside its model; apply it to the model and its "
            "modules: MultiPose(fully_shard(model)), or as one piece: fully_shard(MultiPose(model))"
        )


def refuse_pose_parallel(inputs: Sequence[Tensor], combination: object) -> None:
    """Refuse a group that cannot be shared over the ranks of a `process_group`.

    Raises:
        PosesError: A pose requires grad.
        CombinationError: The combination works on the gradients of all poses.
    """
    if inputs:
        raise PosesError(
            "a pose requires grad, and no rank could tell whether the others have the same tensor or one of their own; "
            "with a process_group, let the model itself compute what is to be trained, or detach the poses"
        )
    if getattr(combination, "combine_gradients", None) is not None:
        raise CombinationError(
            "the combination defines combine_gradients, which needs the gradients of all poses in one process; use it "
            "without process_group"
        )

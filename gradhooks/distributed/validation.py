"""Refuse arrangements of several processes in which gradients would be wrong or ranks would deadlock."""

import sys
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.errors import CombinationError, DistributedError, PosesError


def _data_parallel_wrappers() -> tuple[type[nn.Module], ...]:
    # A process that wraps a model in FSDP has imported FSDP; importing it here would cost others half a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else (fsdp.FullyShardedDataParallel,)
    return (DataParallel, DistributedDataParallel, *sharded)


def _has_several_ranks(process_group: "dist.ProcessGroup | None") -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


def synchronizing_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of `model` that may synchronize ranks in each pose, with their paths."""
    kinds: tuple[type[nn.Module], ...] = (nn.SyncBatchNorm, *_data_parallel_wrappers())
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]


def refuse_synchronized_modules(model: nn.Module, synchronizing: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse a model that contains, or is inside, a module that synchronizes ranks in each pose.

    These are data-parallel wrappers inside `MultiPose`, `DataParallel` around it, and `SyncBatchNorm` in training mode.

    Args:
        model: The model.
        synchronizing: Its `synchronizing_modules`.

    Raises:
        DistributedError: The model has such a module.
    """
    if "_is_replica" in model.__dict__:  # a replica has no parameters: it would run as a model without any to train
        raise DistributedError(
            "MultiPose cannot run inside torch.nn.DataParallel, which splits the poses of a group over replicas; start "
            "one process for each GPU and use DistributedDataParallel(MultiPose(model)). The Trainer of transformers "
            "does so under torchrun or accelerate launch; under plain python it uses DataParallel if it sees several "
            "GPUs (CUDA_VISIBLE_DEVICES=0 shows it one)"
        )
    for path, module in synchronizing:
        where = f"module {path!r} of the model" if path else "the model"
        if isinstance(module, nn.SyncBatchNorm):
            if not (module.training and _has_several_ranks(module.process_group)):
                continue
            raise DistributedError(
                f"{where} is a SyncBatchNorm in training mode, which mixes poses across ranks: gradients would be "
                "wrong, or ranks with different numbers of poses would deadlock; use BatchNorm, or put the module in "
                "evaluation mode: module.eval()"
            )
        raise DistributedError(
            f"{where} is a {type(module).__name__}, which would synchronize gradients once for each pose; wrap the "
            "bare model in MultiPose and put the wrapper outside: DistributedDataParallel(MultiPose(model))"
        )


def refuse_sharded_parameters(
    sharded: ShardedModel, collectives: Collectives, accumulator: str, *, supports_sharded: bool
) -> None:
    """Refuse options that do not work with sharded parameters.

    Args:
        sharded: The sharded model.
        collectives: The ranks of `process_group`.
        accumulator: Name of the accumulator.
        supports_sharded: Whether the accumulator allows that poses are recomputed, as sharded parameters require.

    Raises:
        DistributedError: The accumulator does not support sharded parameters, there is a `process_group` as well, or
            the FSDP root is outside MultiPose.
    """
    if not supports_sharded:
        raise DistributedError(
            f"accumulator {accumulator!r} needs the gradients of single poses, and no rank has them: the parameters of "
            "the model are sharded over ranks; use accumulator='auto' or 'recompute'"
        )
    if not collectives.is_single:
        raise DistributedError(
            "process_group cannot be used with sharded parameters, where every rank needs groups of its own; use "
            "MultiPose without process_group, or a model that is not sharded"
        )
    if sharded.fsdp_root_is_outside:
        raise DistributedError(
            "the FSDP root is outside MultiPose: fully_shard was applied to MultiPose, or to a module around it, and "
            "also to modules inside its model; apply it to the model and its modules, MultiPose(fully_shard(model)), "
            "or to MultiPose only, fully_shard(MultiPose(model))"
        )


def refuse_pose_parallel(inputs: Sequence[Tensor], combination: object) -> None:
    """Refuse a batch that cannot be split over the ranks of a `process_group`.

    Args:
        inputs: Tensors in the poses that require grad.
        combination: The combination.

    Raises:
        PosesError: A pose requires grad.
        CombinationError: The combination needs the gradients of all poses.
    """
    if inputs:
        raise PosesError(
            "a pose requires grad, which process_group does not support: a rank cannot know whether the other ranks "
            "use the same tensor; compute the differentiable part inside the model, or detach the poses"
        )
    if getattr(combination, "combine_gradients", None) is not None:
        raise CombinationError(
            "the combination defines combine_gradients, which needs the gradients of all poses in one process; use it "
            "without process_group"
        )

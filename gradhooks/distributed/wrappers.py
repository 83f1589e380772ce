"""What gradhooks cannot sit outside of: wrappers that synchronise gradients at each backward."""

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradhooks.errors import DistributedError


def _wrappers() -> tuple[type[nn.Module], ...]:
    # Who wraps a model by FSDP has imported it; half a second need not be spent on everybody else.
    sharding = sys.modules.get("torch.distributed.fsdp")
    sharded = () if sharding is None else (sharding.FullyShardedDataParallel,)
    return (DataParallel, DistributedDataParallel, *sharded)


def refuse_synchronised(model: nn.Module) -> None:
    """Refuse a model that is, or holds, a data-parallel wrapper.

    Raises:
        DistributedError: Its gradients would be synchronised once for each pose, or not at all.
    """
    wrappers = _wrappers()
    for path, module in model.named_modules():
        if isinstance(module, wrappers):
            where = f"module {path!r} of the model" if path else "the model"
            raise DistributedError(
                f"{where} is a {type(module).__name__}, which would synchronise gradients once for each pose; wrap the "
                "bare model in MultiPose, and what synchronises around that: DistributedDataParallel(MultiPose(model))"
            )

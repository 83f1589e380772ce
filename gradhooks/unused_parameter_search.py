"""What DistributedDataParallel sees when it searches the outputs of a forward for parameters that are unused.

With `find_unused_parameters=True` it walks the graphs of the tensors in the returned tuple, which are `combined` and
`per_pose`. Parameters that only lead to other outputs of a combination, such as predictions of instances, would count
as unused, and be an error when their gradient arrives. So the graph of `combined` leads to those outputs too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves


class _LeadsTo(torch.autograd.Function):
    """Returns its first argument; the others get no gradient."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *outputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.count = len(outputs)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *received: Tensor | None) -> Any:
        return (*received, *[None] * ctx.count)


def visible_to_search(result: Tensor, outputs: Sequence[Any]) -> Tensor:
    """Return `result`, whose graph also leads to `outputs` if this is the forward of a module that searches it.

    Args:
        result: What the forward returns.
        outputs: What else a loss may use: tensors, and tuples of them.
    """
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is None or not active.find_unused_parameters or not result.requires_grad:
        return result
    others = [output for output in tree_leaves(outputs) if isinstance(output, Tensor) and output.requires_grad]
    made: Tensor = _LeadsTo.apply(result, *others) if others else result
    return made

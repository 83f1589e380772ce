"""Run poses without a graph, and find out whether the model refuses that."""

import torch
from torch import Tensor

from gradhooks.engine.accumulation import Chunk
from gradhooks.engine.context import ForwardContext
from gradhooks.engine.memory_budget import ran_out_of_memory
from gradhooks.engine.pose_runner import NeedsGradModeError
from gradhooks.errors import GradhooksError


def run_without_graph(context: ForwardContext, chunk: Chunk) -> Tensor:
    """Return the predictions of a chunk, detached.

    Raises:
        NeedsGradModeError: The chunk cannot run outside grad mode: the model registers hooks on its tensors, looks at
            their graph, or differentiates in its forward. Remembered for later batches.
    """
    batch = context.batch
    try:
        return batch.runner.run_without_graph(context.poses, chunk.start, chunk.stop)
    except NeedsGradModeError:
        batch.learned.needs_grad_mode.add(batch.mode)
        raise
    except Exception as error:
        if not _is_cured_by_grad_mode(context, chunk, error):
            raise
        batch.learned.needs_grad_mode.add(batch.mode)
        raise NeedsGradModeError from error


def _is_cured_by_grad_mode(context: ForwardContext, chunk: Chunk, error: Exception) -> bool:
    """Return whether the same chunk fails again outside grad mode, and does not fail in grad mode.

    Messages do not tell: models assert, look at `grad_fn`, call functions of PyTorch that raise all kinds of errors.
    """
    batch = context.batch
    is_other = batch.sharded or isinstance(error, GradhooksError) or ran_out_of_memory(error)
    if is_other or batch.mode in batch.learned.needs_grad_mode:
        return False
    with batch.parts.state.preserved():
        return not _runs(context, chunk, grad_mode=False) and _runs(context, chunk, grad_mode=True)


def _runs(context: ForwardContext, chunk: Chunk, *, grad_mode: bool) -> bool:
    context.batch.parts.state.restore(chunk.before)
    try:
        with torch.set_grad_enabled(grad_mode):
            context.batch.runner.run(context.poses, chunk.start, chunk.stop)
    except Exception:
        return False
    return True

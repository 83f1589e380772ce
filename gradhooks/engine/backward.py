"""Run a backward from predictions with known cotangents."""

import torch
from torch import Tensor

# Private, and what `torch.autograd.backward` calls after checks, which take longer than the step of a small layer.
_run_engine = getattr(torch.autograd.graph, "_engine_run_backward", None)


def run_backward(predictions: Tensor, cotangents: Tensor, *, retain_graph: bool = False) -> None:
    """Add the gradients of the leaves below `predictions` to their `.grad`, as `torch.autograd.backward` does.

    Args:
        predictions: Live predictions.
        cotangents: Of the same shape, dtype and device.
        retain_graph: Whether another backward follows.
    """
    if _run_engine is None or torch._C._are_functorch_transforms_active():
        torch.autograd.backward(predictions, cotangents, retain_graph=retain_graph)
    else:
        _run_engine(
            (predictions,), (cotangents,), retain_graph, False, (), allow_unreachable=True, accumulate_grad=True
        )

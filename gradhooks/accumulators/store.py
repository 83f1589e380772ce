"""Keep every pose's gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Coefficients, Ledger
from gradhooks.accumulators.recompute import Recompute
from gradhooks.accumulators.sums import Gradients, accumulate
from gradhooks.group import Chunk, Group


class Store(Accumulator):
    """One backward for each pose, whose gradient is kept: N copies of the gradients.

    Serves every loss without running a pose twice, and combinations that work on the gradients themselves. Predictions
    of more than one number are recomputed.

    Args:
        device: Where to keep them, the leaf's own if None. Towards `"cpu"` on CUDA, copies go through pinned memory
            beside the computation.
        dtype: In which precision to keep them, the leaf's own if None.
    """

    name = "store"

    def __init__(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype

    def open(self, group: Group, predictions: Tensor) -> Ledger:
        if predictions.numel() != len(predictions):
            group.report.reason = "predictions of more than one number are not stored"
            group.report.accumulator = Recompute.name
            return Recompute().open(group, predictions)
        return StoreLedger(group, self.device, self.dtype)


class StoreLedger(Ledger):
    """A list of gradients for each pose, None where the pose does not reach the leaf."""

    keeps_graph = True

    def __init__(self, group: Group, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self._group = group
        self._device = device
        self._dtype = dtype
        self._gradients: list[Gradients] = []
        self._hooks = group.shadows.intercept(self._receive, range(len(group.shadows.leaves)))

    def _receive(self, place: int, gradient: Tensor) -> None:
        pose = self._gradients[-1]
        # A leaf used twice by reentrant checkpoints receives twice.
        known = pose[place]
        pose[place] = self._kept(gradient) if known is None else known + self._kept(gradient)

    def _kept(self, gradient: Tensor) -> Tensor:
        gradient = gradient.to(self._dtype or gradient.dtype)
        device = self._device or gradient.device
        if device.type != "cpu" or gradient.device.type == "cpu" or gradient.is_sparse:
            return gradient.to(device)
        pinned = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
        return pinned.copy_(gradient, non_blocking=True)

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        flat = predictions.flatten()
        for row, one in enumerate(torch.eye(len(flat), dtype=flat.dtype, device=flat.device)):
            self._gradients.append([None] * len(self._group.shadows.leaves))
            if predictions.requires_grad:
                self._group.backward(flat, one, retain_graph=row < len(flat) - 1)
                self._group.report.backwards += 1

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        del predictions
        self._hooks.close()
        if self._device is not None and self._device.type == "cpu" and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies run beside the host
        self._present = [[gradient is not None for gradient in pose] for pose in self._gradients]
        kept = [gradient for pose in self._gradients for gradient in pose if gradient is not None]
        self._gradients = []
        return kept

    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        del last
        totals: Gradients = [None] * len(self._group.shadows.leaves)
        pending = iter(kept)
        for present, coefficient in zip(self._present, coefficients.total.flatten().tolist(), strict=True):
            for place, there in enumerate(present):
                if there:
                    gradient = next(pending).to(totals_dtype(self._group, place))
                    totals[place] = accumulate(totals[place], gradient, coefficient)
        leaves = self._group.shadows.leaves
        return [None if total is None else total.to(leaf.device) for total, leaf in zip(totals, leaves, strict=True)]


def totals_dtype(group: Group, place: int) -> torch.dtype:
    """Sums are float32 or wider, however narrow what was stored is."""
    return torch.promote_types(group.shadows.leaves[place].dtype, torch.float32)

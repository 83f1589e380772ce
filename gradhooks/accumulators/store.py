"""Keep every pose's gradient."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulation, Accumulator, Coefficients
from gradhooks.accumulators.recompute import Recompute
from gradhooks.engine.context import Chunk, Group
from gradhooks.engine.gradient_sums import Gradients, accumulate, all_finite
from gradhooks.engine.rerun import replayed_gradients
from gradhooks.errors import CombinationError
from gradhooks.numerics import wide


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

    def open(self, group: Group, predictions: Tensor) -> Accumulation:
        if predictions.numel() != len(predictions):
            if group.combination.combine_gradients is not None:
                raise CombinationError(
                    f"combination {group.combination.name}: combine_gradients gets one gradient of each pose, and the "
                    f"model predicts {tuple(predictions.shape[1:])}, of which each number has its own; let call= "
                    "choose or make one number"
                )
            return Recompute().take_over(group, predictions, "predictions of more than one number are not stored")
        return StoreAccumulation(group, self.device, self.dtype, group.fp16_scale(predictions))


class StoreAccumulation(Accumulation):
    """A list of gradients for each pose, None where the pose does not reach the leaf."""

    keeps_graph = True

    def __init__(self, group: Group, device: torch.device | None, dtype: torch.dtype | None, guard: float) -> None:
        self._group = group
        self._device = device
        self._dtype = dtype
        self._guard = guard
        self._chunks: list[Chunk] = []
        self._gradients: list[Gradients] = []
        self._hooks = group.shadows.intercept(self._receive, range(len(group.shadows.leaves)))

    def _receive(self, place: int, gradient: Tensor) -> None:
        pose = self._gradients[-1]
        known = pose[place]
        if known is not None:  # a parameter that several reentrant checkpoints use receives from each
            gradient = gradient + known.to(gradient)
        pose[place] = self._kept(gradient)

    def _kept(self, gradient: Tensor) -> Tensor:
        gradient = gradient.to(self._dtype or gradient.dtype)
        device = self._device or gradient.device
        if device.type != "cpu" or gradient.device.type != "cuda" or gradient.is_sparse:
            return gradient.to(device)
        pinned = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
        return pinned.copy_(gradient, non_blocking=True)

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self._chunks.append(chunk)
        rows = predictions.numel()
        for row, one in enumerate(torch.eye(rows, dtype=predictions.dtype, device=predictions.device)):
            self._gradients.append([None] * len(self._group.shadows.leaves))
            if predictions.requires_grad:
                cotangent = self._guard * one.view_as(predictions)
                self._group.backward(predictions, cotangent, retain_graph=row < rows - 1)
                self._group.report.backwards += 1

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        self._hooks.close()
        if self._device is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies run beside the host
        self._present = [[gradient is not None for gradient in pose] for pose in self._gradients]
        kept = [gradient for pose in self._gradients for gradient in pose if gradient is not None]
        self._gradients = []
        return [predictions, *kept]

    def gradients(self, kept: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        predictions, *stored = kept
        combine = self._group.combination.combine_gradients
        if combine is not None:
            return self._combined(combine, stored, predictions, coefficients.total)
        totals = self._summed(stored, (coefficients.total.flatten().double() / self._guard).tolist(), overwrite=last)
        if self._guard == 1 or all_finite([totals]):
            return totals
        # Scaled up, a gradient of float16 left its range: have it again, with the true coefficients alone.
        every = torch.ones(len(self._group.poses), dtype=torch.bool)
        return replayed_gradients(self._group, self._chunks, predictions, coefficients.total, every)

    def _combined(
        self,
        combine: Callable[..., Mapping[str, Tensor]],
        stored: Sequence[Tensor],
        predictions: Tensor,
        coefficients: Tensor,
    ) -> Gradients:
        """What the combination makes of the gradients."""
        pending = iter(stored)
        rows = [[next(pending) / self._guard if there else None for there in present] for present in self._present]
        names = [self._group.names()[id(real)] for real in self._group.shadows.real]
        stacks = {}
        for place, (leaf, name) in enumerate(zip(self._group.shadows.leaves, names, strict=True)):
            column = [row[place] for row in rows]
            if any(gradient is not None for gradient in column):
                nothing = torch.zeros_like(leaf, dtype=wide(leaf.dtype))
                stacks[name] = torch.stack([nothing if row is None else row.to(nothing) for row in column])
        delivered = combine(stacks, predictions.flatten(), coefficients.flatten())
        self._check(stacks, delivered)
        return [delivered.get(name) for name in names]

    def _check(self, stacks: Mapping[str, Tensor], delivered: Mapping[str, Tensor]) -> None:
        for name in {*stacks, *delivered}:
            found = delivered[name].shape if name in delivered else "nothing"
            if name not in stacks or found != stacks[name].shape[1:]:
                raise CombinationError(
                    f"combination {self._group.combination.name}: combine_gradients must return a gradient of shape "
                    f"{tuple(stacks[name].shape[1:]) if name in stacks else 'nothing'} for {name!r}, got {found}"
                )

    def _summed(self, stored: Sequence[Tensor], coefficients: Sequence[float], *, overwrite: bool) -> Gradients:
        leaves = self._group.shadows.leaves
        totals: Gradients = [None] * len(leaves)
        pending = iter(stored)
        for present, coefficient in zip(self._present, coefficients, strict=True):
            for place in (place for place, there in enumerate(present) if there):
                gradient = next(pending)
                if coefficient == 0:  # not 0 times the gradient, which may be NaN where a pose was dropped
                    totals[place] = torch.zeros_like(leaves[place]) if totals[place] is None else totals[place]
                    continue
                widened = gradient.to(leaves[place].device, wide(leaves[place].dtype), non_blocking=True)
                if widened is gradient and not overwrite and totals[place] is None:
                    widened = gradient.clone()  # the first to be taken over must not be what is kept
                totals[place] = accumulate(totals[place], widened, coefficient)
        return totals

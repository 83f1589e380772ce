"""Store: keep the gradient of every pose."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Engine, refuse_nonlinear_backward, set_accumulator
from gradhooks.accumulators.host_memory import HostMemory
from gradhooks.accumulators.recompute import Recompute
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.gradient_sums import Gradients, accumulate, add_into, all_finite, zeros_like_gradient
from gradhooks.errors import CombinationError
from gradhooks.numerics import at_least_float32


class Store(Accumulator):
    """One backward per pose, whose gradient is kept: N copies of the gradients.

    Serves every loss without running a pose twice, and combinations that work on the gradients. Predictions of more
    than one number are recomputed.

    Args:
        device: The device on which the gradients are kept; None keeps them where they are. From CUDA to `"cpu"` they
            are copied through pinned memory, asynchronously.
        dtype: The dtype in which they are kept; None keeps that of the parameter.
    """

    name = "store"
    ignored_options = frozenset({"tolerance"})

    def __init__(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        return self.begin_because(engine, predictions, "it was requested by name")

    def begin_because(self, engine: Engine, predictions: Tensor, reason: str) -> Accumulation:
        """Begin a batch for a reason that the report shows."""
        if engine.combination.combine_gradients is not None and engine.options.tolerance is not None:
            raise CombinationError(
                f"combination {engine.combination.name}: combine_gradients needs the gradient of every pose, so that "
                f"none is skipped; leave out tolerance={engine.options.tolerance}"
            )
        if predictions.numel() == len(predictions):
            refuse_nonlinear_backward(engine, self.name)
            set_accumulator(engine, self.name, reason)
            return StoreAccumulation(engine, self.device, self.dtype, engine.fp16_scale(predictions))
        if engine.combination.combine_gradients is not None:
            raise CombinationError(
                f"combination {engine.combination.name}: combine_gradients needs scalar predictions; pose 0 has shape "
                f"{tuple(predictions.shape[1:])}. Choose or make one number with call="
            )
        return Recompute().begin_because(
            engine, "'store' keeps the gradient of one number per pose, and a prediction has several"
        )


class StoreAccumulation(Accumulation):
    """A list of gradients per pose, None where the pose does not reach the leaf."""

    keeps_graph = True

    def __init__(
        self, engine: Engine, device: torch.device | None, dtype: torch.dtype | None, fp16_scale: float
    ) -> None:
        self._engine = engine
        self._device = device
        self._dtype = dtype
        self._fp16_scale = fp16_scale
        self._gradients: list[Gradients] = []
        self._postponed: list[int] = []
        self._host_memory: HostMemory | None = None
        self._shared: list[Chunk] = []  # with several poses in one graph
        self._hooks = engine.intercept(self._receive, range(len(engine.leaves)))

    def _receive(self, index: int, gradient: Tensor) -> None:
        of_pose = self._gradients[-1]
        earlier = of_pose[index]
        if earlier is not None:  # a parameter that several reentrant checkpoints use receives one gradient from each
            gradient = gradient + earlier.to(gradient)
        of_pose[index] = self._to_store(gradient)

    def _to_store(self, gradient: Tensor) -> Tensor:
        gradient = gradient.to(self._dtype or gradient.dtype)
        device = self._device or gradient.device
        if device.type != "cpu" or gradient.device.type != "cuda" or gradient.is_sparse:
            return gradient.to(device)
        if self._host_memory is None:
            self._host_memory = HostMemory(self._engine.pose_count * self._engine.gradient_bytes, pinned=True)
        return self._host_memory.empty(gradient.shape, gradient.dtype).copy_(gradient, non_blocking=True)

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        count = predictions.numel()
        if count > 1:
            self._shared.append(chunk)
        for row, one_hot in enumerate(torch.eye(count, dtype=predictions.dtype, device=predictions.device)):
            self._gradients.append([None] * len(self._engine.leaves))
            if predictions.requires_grad:
                cotangents = self._fp16_scale * one_hot.view_as(predictions)
                self._engine.backward(predictions, cotangents, retain_graph=row < count - 1, poses=1)

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        self._hooks.close()
        if self._shared and self._engine.options.nonfinite == "drop":
            self._postpone(predictions.isfinite().flatten().tolist())
        if self._device is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # waits for the asynchronous copies
        self._present = [[gradient is not None for gradient in of_pose] for of_pose in self._gradients]
        stored = [gradient for of_pose in self._gradients for gradient in of_pose if gradient is not None]
        self._gradients = []
        return [predictions, *stored]

    def _postpone(self, finite: list[bool]) -> None:
        """Forget the gradients of chunks with a dropped pose: its NaN has spread. The other poses run again later."""
        for chunk in self._shared:
            rows = range(chunk.start, chunk.stop)
            if all(finite[row] for row in rows):
                continue
            self._postponed += [row for row in rows if finite[row]]
            for row in rows:
                self._gradients[row] = [None] * len(self._engine.leaves)

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        predictions, *stored = saved
        combine = self._engine.combination.combine_gradients
        if combine is not None:
            return self._combined(combine, stored, predictions, coefficients.total)
        factors = (coefficients.total.flatten().double() / self._fp16_scale).tolist()
        totals = self._summed(stored, factors, overwrite=last)
        if self._fp16_scale == 1 or all_finite([totals]):
            if self._postponed:
                add_into(totals, self._rerun(predictions, coefficients.total, self._postponed))
            return totals
        # Scaled up, a float16 gradient overflowed: run all poses again with their coefficients, without a scale.
        poses = [pose for group in self._groups_of_poses(predictions) for pose in group]
        return self._rerun(predictions, coefficients.total, poses)

    def _rerun(self, predictions: Tensor, cotangents: Tensor, poses: Sequence[int]) -> Gradients:
        selected = torch.zeros(self._engine.pose_count, dtype=torch.bool)
        selected[list(poses)] = True
        return self._engine.rerun(predictions, cotangents, selected)

    def _combined(
        self,
        combine: Callable[..., Mapping[str, Tensor]],
        stored: Sequence[Tensor],
        predictions: Tensor,
        coefficients: Tensor,
    ) -> Gradients:
        """Return what the combination makes of the gradients, group by group."""
        pending = iter(stored)
        rows = [[next(pending) / self._fp16_scale if there else None for there in present] for present in self._present]
        for pose in self._postponed:
            rows[pose] = self._rerun(predictions, torch.ones_like(predictions), [pose])
        names = self._engine.leaf_names
        totals: Gradients = [None] * len(names)
        for poses in self._groups_of_poses(predictions):
            stacks = self._stacks([rows[pose] for pose in poses], names)
            index = torch.tensor(poses, device=predictions.device)
            combined = combine(stacks, predictions.flatten()[index], coefficients.flatten()[index])
            self._check(stacks, combined)
            add_into(totals, [combined.get(name) for name in names], copy=self._engine.group_count > 1)
        return totals

    def _groups_of_poses(self, predictions: Tensor) -> list[list[int]]:
        """Return the poses of each group that has any, without those that are dropped."""
        engine = self._engine
        count = len(predictions)
        kept = predictions.isfinite().flatten().tolist() if engine.options.nonfinite == "drop" else [True] * count
        groups: list[list[int]] = [[] for _ in range(engine.group_count)]
        for pose, group in enumerate(engine.groups or [0] * count):
            if kept[pose]:
                groups[group].append(pose)
        return [poses for poses in groups if poses]

    def _stacks(self, rows: Sequence[Gradients], names: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradients of some poses, stacked, for each leaf that one of them reaches."""
        stacks = {}
        for index, (leaf, name) in enumerate(zip(self._engine.leaves, names, strict=True)):
            column = [row[index] for row in rows]
            if any(gradient is not None for gradient in column):
                zeros = torch.zeros_like(leaf, dtype=at_least_float32(leaf.dtype))
                stacks[name] = torch.stack([zeros if gradient is None else gradient.to(zeros) for gradient in column])
        return stacks

    def _check(self, stacks: Mapping[str, Tensor], combined: Mapping[str, Tensor]) -> None:
        for name in {*stacks, *combined}:
            shape = tuple(combined[name].shape) if name in combined else "nothing"
            expected = tuple(stacks[name].shape[1:]) if name in stacks else "nothing"
            if shape != expected:
                raise CombinationError(
                    f"combination {self._engine.combination.name}: combine_gradients must return a gradient of shape "
                    f"{expected} for {name!r}, got {shape}"
                )

    def _summed(self, stored: Sequence[Tensor], factors: Sequence[float], *, overwrite: bool) -> Gradients:
        """Return `sum_i factors[i] * gradient_i` for each leaf."""
        leaves = self._engine.leaves
        totals: Gradients = [None] * len(leaves)
        pending = iter(stored)
        for present, factor in zip(self._present, factors, strict=True):
            for index in (index for index, there in enumerate(present) if there):
                gradient, leaf = next(pending), leaves[index]
                dtype = at_least_float32(leaf.dtype)
                if factor == 0:  # 0 times a gradient that is NaN, that of a dropped pose, would be NaN
                    zeros = zeros_like_gradient(gradient, dtype).to(leaf.device)
                    totals[index] = accumulate(totals[index], zeros, 1.0)
                    continue
                widened = gradient.to(leaf.device, dtype, non_blocking=True)
                kept = widened is gradient and not overwrite  # the total must not share memory with what is stored
                totals[index] = accumulate(totals[index], widened, factor, copy=kept)
        return totals

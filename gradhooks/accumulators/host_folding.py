"""HostFolding: fold gradients with factors that the host knows, so that poses that do not matter get no backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Engine
from gradhooks.accumulators.declared_weights import DeclaredWeights
from gradhooks.accumulators.online_softmax import OnlineSoftmax
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.running_sums import RunningSums


class HostFolding:
    """Folds the gradients of a batch into running sums, with factors that are Python numbers.

    Args:
        engine: The batch.
        feature_count: `K`.
        threshold: The factor below which a pose gets no backward.
        uniform: Whether all factors are 1, so that nothing has to be read from a device.

    Attributes:
        had_backward: Which poses had a backward, a byte for each.
        postponed: Which poses run again later, whatever their factors.
        reached_by_skipped: The leaves that only skipped poses are known to reach.
    """

    def __init__(self, engine: Engine, feature_count: int, threshold: float, *, uniform: bool) -> None:
        self._engine = engine
        self._sum_count = 1 + feature_count
        self._drop = engine.options.nonfinite == "drop"
        self.uniform = uniform
        self._softmax = OnlineSoftmax(feature_count, threshold, engine.group_count)
        self._sums = RunningSums(engine, self._sum_count * engine.group_count)
        self.had_backward = bytearray()
        self.postponed = bytearray()
        self.reached_by_skipped: set[int] = set()

    def add(self, predictions: Tensor, groups: list[int], declared: DeclaredWeights, fp16_scale: float) -> None:
        """Fold the gradients of a chunk.

        Args:
            predictions: Live, shape `(n, *prediction)` with one number per prediction.
            groups: The group of each pose.
            declared: What the combination declares.
            fp16_scale: Multiplies all cotangents.
        """
        if len(groups) == 1 and not self._drop:
            self._add_pose(predictions, groups, declared, fp16_scale)
            return
        count = len(groups)
        dropped = predictions.isfinite().flatten().logical_not().tolist() if self._drop else [False] * count
        # The backward of a shared graph would spread the NaN of a dropped pose: its other poses run again later.
        postponed = count > 1 and any(dropped)
        self.postponed.extend([postponed] * count)
        factors = self._factors(declared, groups, [True] * count if postponed else dropped)
        counted = [predictions.requires_grad and any(row) for row in factors]  # a constant has no backward
        self.had_backward.extend(counted)
        if any(counted):
            self._fold(predictions, groups, factors, counted, fp16_scale)
        elif predictions.requires_grad and not postponed:
            self._skip(predictions, finite=not any(dropped))

    def _add_pose(self, predictions: Tensor, groups: list[int], declared: DeclaredWeights, fp16_scale: float) -> None:
        """Fold the gradient of a chunk of one pose, which is not dropped: Python counts here."""
        factors = self._factors(declared, groups, [])[0]
        counts = predictions.requires_grad and any(factors)  # a constant has no backward
        self.postponed.append(False)
        self.had_backward.append(counts)
        if counts:
            self._fold_pose(predictions, groups[0] * self._sum_count, factors, fp16_scale)
        elif predictions.requires_grad:
            self._skip(predictions, finite=True)

    def _fold_pose(self, predictions: Tensor, first: int, factors: list[float], fp16_scale: float) -> None:
        cotangents = torch.full_like(predictions, factors[0] * fp16_scale)
        if self._sum_count == 1:
            self._sums.add_to(first)
            self._engine.backward(predictions, cotangents)
            return
        # The cotangent carries the first factor, the folding multiplies by the others.
        with self._sums.fold_into(first, [factor / factors[0] for factor in factors]):
            self._engine.backward(predictions, cotangents)

    def _factors(self, declared: DeclaredWeights, groups: list[int], excluded: list[bool]) -> list[list[float]]:
        """Return the factors of a chunk, `1 + K` per pose, after rescaling the sums of the earlier poses."""
        if self.uniform:
            return [[1.0]] * len(groups)
        declaration = declared.on_host()
        rescalings, factors = self._softmax.update(
            declaration.masked(excluded) if any(excluded) else declaration, groups
        )
        for group, factor, shifts in rescalings:
            self._sums.rescale(group * self._sum_count, factor, shifts)
        return factors

    def _fold(
        self,
        predictions: Tensor,
        groups: list[int],
        factors: list[list[float]],
        counted: list[bool],
        fp16_scale: float,
    ) -> None:
        """Add the gradients of a chunk to the sums of its groups."""
        rows: dict[int, list[int]] = {}
        for row in (row for row, counts in enumerate(counted) if counts):
            rows.setdefault(groups[row], []).append(row)
        jobs: list[tuple[int, list[int], int | None]] = []
        for group, members in rows.items():
            if len(members) == 1 and self._sum_count > 1:  # one backward serves all sums
                jobs.append((group * self._sum_count, members, None))
            else:
                jobs.extend((group * self._sum_count, members, k) for k in range(self._sum_count))
        for number, (first, members, k) in enumerate(jobs):
            retain_graph, poses = number < len(jobs) - 1, 0 if number else sum(counted)
            cotangents = _cotangents(predictions, factors, members, k or 0, fp16_scale)
            if k is None:
                # The cotangent carries the first factor, the folding multiplies by the others.
                ratios = [factor / factors[members[0]][0] for factor in factors[members[0]]]
                with self._sums.fold_into(first, ratios):
                    self._engine.backward(predictions, cotangents, retain_graph=retain_graph, poses=poses)
            else:
                self._sums.add_to(first + k)
                self._engine.backward(predictions, cotangents, retain_graph=retain_graph, poses=poses)

    def _skip(self, predictions: Tensor, *, finite: bool) -> None:
        """Give the leaves that only skipped poses reach a gradient of zeros, and sparse gradients their rows."""
        missing = self._sums.unreached() - self.reached_by_skipped
        reached = missing and missing & self._engine.reached_leaves(predictions)
        if (reached or self._sums.has_sparse) and finite:  # a backward, since it alone shows which gradients are sparse
            self._sums.add_to(0)
            self._engine.backward(predictions, torch.zeros_like(predictions), poses=0)
        elif reached:
            self.reached_by_skipped |= reached

    def take(self) -> list[Gradients]:
        """Return all sums, and end the folding."""
        return self._sums.take()

    def state(self) -> Sequence[Tensor]:
        """Return what `read` needs: nothing, since the host has the factors."""
        return []

    def read(self, state: Sequence[Tensor]) -> None:
        """Take the tensors of `state`, which are now on the host."""

    def factors(self) -> Tensor:
        """Return the factors of all poses, shape `(N, 1 + K)`, float64, on the CPU."""
        if self.uniform:
            return torch.ones(len(self.had_backward), 1, dtype=torch.float64)
        return self._softmax.factors()

    @property
    def largest_exponent(self) -> float:
        """The largest finite log-weight in absolute value."""
        return self._softmax.largest_exponent


def _cotangents(
    predictions: Tensor, factors: list[list[float]], members: list[int], k: int, fp16_scale: float
) -> Tensor:
    """Return the factors `k` of some rows of a chunk, 0 for the others."""
    if len(factors) == 1:
        return torch.full_like(predictions, factors[0][k] * fp16_scale)
    column = [0.0] * len(factors)
    for row in members:
        column[row] = factors[row][k] * fp16_scale
    return torch.tensor(column, dtype=torch.float64).view(predictions.shape)

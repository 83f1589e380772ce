"""DeviceFolding: fold gradients with factors that stay on the device, so that nothing waits for it.

The arithmetic is that of `OnlineSoftmax`, with kernels. Since the host does not know the factors, no pose is skipped,
and the sums of a group are rescaled with each chunk, by 1 where its largest log-weight stays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Engine
from gradhooks.accumulators.declared_weights import DeclaredWeights
from gradhooks.accumulators.online_softmax import factor_rows, largest_size
from gradhooks.engine.gradient_sums import Factor, Gradients
from gradhooks.engine.running_sums import RunningSums
from gradhooks.numerics import per_row, to_float64


class DeviceFolding:
    """Folds the gradients of a batch into running sums, with factors that are tensors of the device.

    Args:
        engine: The batch.
        feature_count: `K`.
        device: The device of the predictions.

    Attributes:
        had_backward: Which poses had a backward, a byte for each.
        postponed: Which poses run again later, a byte for each: none.
        reached_by_skipped: The leaves that only skipped poses reach: none, since no pose is skipped.
    """

    uniform = False

    def __init__(self, engine: Engine, feature_count: int, device: torch.device) -> None:
        self._engine = engine
        self._device = device
        self._sum_count = 1 + feature_count
        self._sums = RunningSums(engine, self._sum_count * engine.group_count)
        self._begun: set[int] = set()  # groups whose sums contain something
        self._tops = to_float64(torch.full((engine.group_count,), -torch.inf, device=device))
        self._references = self._tops.new_zeros(engine.group_count, feature_count)
        self._declared: list[Tensor] = []  # for each chunk, shape (n, 1 + K): log-weights and features
        self._on_host: list[Tensor] = []
        self.had_backward = bytearray()
        self.postponed = bytearray()
        self.reached_by_skipped: set[int] = set()

    def add(self, predictions: Tensor, groups: list[int], declared: DeclaredWeights, fp16_scale: float) -> None:
        """Fold the gradients of a chunk, as `HostFolding.add` does."""
        log_weights, features = declared.columns(self._device)
        self._declared.append(torch.cat([log_weights.unsqueeze(1), features], 1))
        self.postponed.extend([False] * len(groups))
        self.had_backward.extend([predictions.requires_grad] * len(groups))
        index = torch.tensor(groups).to(self._device, non_blocking=True)
        rescaling, shifts = self._raise_tops(index, log_weights, features)
        for group in self._begun.intersection(groups):
            self._sums.rescale(group * self._sum_count, rescaling[group], shifts[group].unbind())
        if predictions.requires_grad:  # a constant has no backward
            references = self._references[index]
            factors = factor_rows(log_weights, features, self._tops[index], references)
            self._fold(predictions, groups, fp16_scale * factors, features - references)
            self._begun.update(groups)

    def _raise_tops(self, index: Tensor, log_weights: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Take the log-weights of a chunk into the largest of each group.

        Returns:
            The factor, shape `(B,)`, and the shifts, shape `(B, K)`, with which to rescale the sums of each group.
        """
        count, old, references = len(index), self._tops, self._references
        usable = (log_weights < torch.inf) & features.isfinite().all(1)  # not NaN either
        candidates = torch.where(usable, log_weights, -torch.inf)
        self._tops = old.scatter_reduce(0, index, candidates, "amax")
        # The first pose of the group that has the new largest log-weight, or `count` if none has.
        is_top = (candidates == self._tops[index]) & (candidates > old[index])
        position = torch.where(is_top, torch.arange(count, device=index.device), count)
        first = torch.full_like(old, count, dtype=torch.int64).scatter_reduce(0, index, position, "amin")
        newest = features[first.clamp(max=count - 1)]
        self._references = torch.where(per_row(first < count, newest), newest, references)
        rescaling = torch.where(self._tops == old, 1.0, (old - self._tops).exp())
        return rescaling, references - self._references

    def _fold(self, predictions: Tensor, groups: list[int], factors: Tensor, centred: Tensor) -> None:
        """Add the gradients of a chunk to the sums of its groups.

        Args:
            predictions: Live, `n` numbers.
            groups: The group of each pose.
            factors: Shape `(n, 1 + K)`.
            centred: Shape `(n, K)`: the features relative to their reference.
        """
        rows: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(group, []).append(row)
        jobs = [
            (group, members, k)
            for group, members in rows.items()
            for k in range(1 if len(members) == 1 else self._sum_count)
        ]
        for number, (group, members, k) in enumerate(jobs):
            first, retain_graph, poses = group * self._sum_count, number < len(jobs) - 1, 0 if number else len(groups)
            cotangents = self._masked(factors[:, k], members).view(predictions.shape)
            if len(members) == 1 and self._sum_count > 1:  # one backward serves all sums
                ratios: list[Factor] = [1.0, *torch.where(centred.isfinite(), centred, 0.0)[members[0]].unbind()]
                with self._sums.fold_into(first, ratios):
                    self._engine.backward(predictions, cotangents, retain_graph=retain_graph, poses=poses)
            else:
                self._sums.add_to(first + k)
                self._engine.backward(predictions, cotangents, retain_graph=retain_graph, poses=poses)

    def _masked(self, column: Tensor, members: list[int]) -> Tensor:
        """Return a column of factors, shape `(n,)`, with 0 for the poses of other groups."""
        if len(members) == len(column):
            return column
        mask = torch.zeros(len(column), dtype=torch.bool)
        mask[members] = True
        return torch.where(mask.to(self._device, non_blocking=True), column, 0.0)

    def take(self) -> list[Gradients]:
        """Return all sums, and end the folding."""
        return self._sums.take()

    def state(self) -> Sequence[Tensor]:
        """Return what `read` needs on the host."""
        return [torch.cat(self._declared), self._tops, self._references]

    def read(self, state: Sequence[Tensor]) -> None:
        """Take the tensors of `state`, which are now on the host."""
        self._on_host = list(state)

    def factors(self) -> Tensor:
        """Return the factors of all poses, shape `(N, 1 + K)`, float64, on the CPU."""
        declared, tops, references = self._on_host
        numbers = self._engine.groups
        groups = torch.zeros(len(declared), dtype=torch.int64) if numbers is None else torch.tensor(numbers)
        return factor_rows(declared[:, 0], declared[:, 1:], tops[groups], references[groups])

    @property
    def largest_exponent(self) -> float:
        """The largest finite log-weight in absolute value."""
        return largest_size(self._on_host[0][:, 0])

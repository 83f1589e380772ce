"""Pose parallel: the poses of one group on several ranks.

Each rank runs its own poses. Predictions are gathered, combination and loss are computed alike everywhere, each rank
runs the backward of its own poses, and the gradients are summed: every rank ends with what one process would have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradhooks.distributed.collectives import Collectives
from gradhooks.errors import DistributedError, PredictionError
from gradhooks.numerics import at_least_float32

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AXES = 8
METADATA_LENGTH = 3 + _AXES  # numbers that tell what predictions look like
_NONE, _DENSE, _SPARSE = range(3)
# Collectives that compute one loss on one kind of machine agree to the last bit, and different losses differ in the first.
_SAME_LOSS = 1e-3


@dataclass(frozen=True)
class PosePartition:
    """Which poses of a group are this rank's. In one process alone, all of them.

    Attributes:
        ranks: The ranks.
        counts: How many poses each has, in their order.
    """

    collectives: Collectives
    counts: list[int]

    @property
    def total(self) -> int:
        """N, over all ranks."""
        return sum(self.counts)

    @property
    def first(self) -> int:
        """How many poses come before those of this rank."""
        return sum(self.counts[: self.collectives.rank])

    @property
    def rows(self) -> slice:
        """The rows of this rank in a tensor of all poses."""
        return slice(self.first, self.first + self.counts[self.collectives.rank])

    def encode_metadata(self, own: Tensor, *, differentiable: bool = False) -> list[float]:
        """What this rank tells of its predictions: whether anything can be trained; axes, type and sizes.

        Raises:
            PredictionError: There are no words for them.
        """
        if self.collectives.is_single:
            return [differentiable]
        sizes = own.shape[1:]
        if len(sizes) > _AXES or own.dtype not in _DTYPES:
            raise PredictionError(f"predictions of shape {tuple(sizes)} and {own.dtype} are not gathered over ranks")
        return [differentiable, len(sizes), _DTYPES.index(own.dtype), *sizes, *[0] * (_AXES - len(sizes))]

    def gather_predictions(self, own: Tensor, outlines: Sequence[Sequence[float]], device: torch.device) -> Tensor:
        """Gather the predictions.

        Args:
            own: Those of this rank, shape `(n, *prediction)`; any shape where it has no poses.
            outlines: What each rank said of its own (`encode_metadata`).
            device: Where a rank without poses has its model.

        Returns:
            Shape `(N, *prediction)`, detached.

        Raises:
            PredictionError: They have not one shape and type.
        """
        if self.collectives.is_single:
            return own
        kinds = {tuple(told[1:]) for told, count in zip(outlines, self.counts, strict=True) if count}
        if len(kinds) > 1:
            described = [f"rank {rank}: {_described(told)}" for rank, told in enumerate(outlines)]
            raise PredictionError(f"all poses of a group must give predictions of one kind; {'; '.join(described)}")
        axes, dtype, *sizes = map(int, kinds.pop())
        if not len(own):
            own = torch.empty(0, *sizes[:axes], dtype=_DTYPES[dtype], device=device)
        return self.collectives.gather_rows(own, self.counts)

    def sum_gradients(
        self, of_own: Callable[[], list[Tensor | None]], coefficients: Tensor, leaves: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients of all ranks together, one for each leaf, None where no pose of any rank reaches it.

        Args:
            of_own: Gives those of this rank's poses, float32 or wider.
            coefficients: `dL/dy` of all poses, shape `(N, *prediction)`: alike on all ranks.
            leaves: The leaves.

        Raises:
            DistributedError: A rank failed, the ranks have computed different losses, or a gradient is sparse.
        """
        with self.collectives.all_or_none("its backward", 3 + len(leaves), maximum=True) as notes:
            gradients = of_own()
            total, size = _fingerprint(coefficients)
            notes.sent = [total, -total, size, *map(_kind, gradients)]
        highest, lowest, largest, *kinds = notes.received[0]
        if highest + lowest > _SAME_LOSS * largest:
            self._refuse_different_losses(total)
        if _SPARSE in kinds:
            raise DistributedError(
                "a gradient is sparse, and sparse gradients are not summed over ranks; use sparse=False in the "
                "embeddings of a model whose poses are shared over a process_group"
            )
        reached = [place for place, kind in enumerate(kinds) if kind]
        travelling = (_handed_over(gradients, place, leaves[place]) for place in reached)
        for place, gradient in zip(reached, self.collectives.sum_tensors(travelling), strict=True):
            gradients[place] = gradient
        return gradients

    def _refuse_different_losses(self, total: float) -> None:
        with self.collectives.all_or_none("its backward", 1) as notes:
            notes.sent = [total]
        first = notes.received[0][0]
        rank, other = max(enumerate(told for (told,) in notes.received), key=lambda found: abs(found[1] - first))
        raise DistributedError(
            f"rank {rank} has computed another loss than rank 0 of the group that they share: a weighted sum of its "
            f"coefficients is {other:.6g}, that of rank 0 {first:.6g}. All ranks of a process_group must get the same "
            "target and the same combination weights, and draw the same random numbers after the poses"
        )


def _handed_over(gradients: list[Tensor | None], place: int, leaf: Tensor) -> Tensor:
    gradient, gradients[place] = gradients[place], None  # to be freed with its bucket
    return torch.zeros_like(leaf, dtype=at_least_float32(leaf.dtype)) if gradient is None else gradient


def _fingerprint(coefficients: Tensor) -> list[float]:
    """A weighted sum, which tells two poses apart, and how large its terms are."""
    rows = coefficients.detach().double().nan_to_num(0, 0, 0).reshape(len(coefficients), -1)
    terms = rows * torch.linspace(1, 2, len(rows), dtype=rows.dtype, device=rows.device).unsqueeze(1)
    sums: list[float] = torch.stack([terms.sum(), terms.abs().sum()]).tolist()
    return sums


def _described(told: Sequence[float]) -> str:
    axes, dtype, *sizes = map(int, told[1:])
    return f"shape {tuple(sizes[:axes])}, {_DTYPES[dtype]}"


def _kind(gradient: Tensor | None) -> int:
    return _NONE if gradient is None else _SPARSE if gradient.is_sparse else _DENSE

"""Pose parallel: split the poses of a batch over ranks.

Each rank runs its own poses. Predictions are gathered, every rank computes the same combination and loss, each rank
runs the backward of its own poses, and the gradients are summed. Every rank ends with the gradients of a single process
that runs all poses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradhooks.distributed.collectives import Collectives
from gradhooks.errors import DistributedError, PredictionError
from gradhooks.numerics import at_least_float32

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_DIMENSIONS = 8
# Numbers of `PosePartition.encode_metadata`: differentiable, dimensions, dtype, sizes.
METADATA_LENGTH = 3 + _MAX_DIMENSIONS
_ABSENT, _DENSE, _SPARSE = range(3)
# On machines of one kind, ranks with the same loss agree to the last bit. Different losses differ in the first digits.
_SAME_LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class PosePartition:
    """Contiguous partition of the `N` poses of a batch over ranks. A single process has all of them.

    Attributes:
        collectives: The ranks.
        counts: Number of poses of each rank, in rank order.
    """

    collectives: Collectives
    counts: list[int]

    @property
    def total(self) -> int:
        """`N`, the number of poses on all ranks."""
        return sum(self.counts)

    @property
    def first(self) -> int:
        """Index of the first pose of this rank among the `N` poses."""
        return sum(self.counts[: self.collectives.rank])

    @property
    def rows(self) -> slice:
        """Rows of this rank in a tensor with one row for each of the `N` poses."""
        return slice(self.first, self.first + self.counts[self.collectives.rank])

    def encode_metadata(self, rows: Tensor, *, differentiable: bool = False) -> list[float]:
        """Encode shape and dtype of this rank's predictions as numbers.

        Args:
            rows: Predictions of this rank, shape `(n, *prediction)`.
            differentiable: Whether any of them requires grad.

        Returns:
            `METADATA_LENGTH` numbers; in a single process, which needs no metadata, `differentiable` only.

        Raises:
            PredictionError: Unsupported dtype, or more than 8 dimensions.
        """
        if self.collectives.is_single:
            return [differentiable]
        sizes = rows.shape[1:]
        if len(sizes) > _MAX_DIMENSIONS or rows.dtype not in _DTYPES:
            raise PredictionError(
                f"cannot gather predictions of shape {tuple(sizes)} and {rows.dtype} over ranks; supported are at most "
                f"{_MAX_DIMENSIONS} dimensions and {', '.join(map(str, _DTYPES))}. Convert them in call="
            )
        padding = [0] * (_MAX_DIMENSIONS - len(sizes))
        return [differentiable, len(sizes), _DTYPES.index(rows.dtype), *sizes, *padding]

    def gather_predictions(self, rows: Tensor, metadata: Sequence[Sequence[float]], device: torch.device) -> Tensor:
        """Gather the predictions of all ranks.

        Args:
            rows: Predictions of this rank, shape `(n, *prediction)`; any shape if it has no poses.
            metadata: `encode_metadata` of each rank.
            device: Device of the model, for a rank without poses.

        Returns:
            Predictions of all poses, shape `(N, *prediction)`, detached.

        Raises:
            PredictionError: Shapes or dtypes differ between ranks.
        """
        if self.collectives.is_single:
            return rows
        encoded = {rank: numbers for rank, numbers in enumerate(metadata) if self.counts[rank]}
        distinct = {tuple(numbers[1:]) for numbers in encoded.values()}
        if len(distinct) > 1:
            described = "; ".join(f"rank {rank}: {_describe_metadata(numbers)}" for rank, numbers in encoded.items())
            raise PredictionError(
                f"predictions of one group differ in shape or dtype between ranks: {described}. Return the same shape "
                "and dtype for every pose, for example with call="
            )
        dimensions, dtype, *sizes = map(int, distinct.pop())
        if not len(rows):
            rows = torch.empty(0, *sizes[:dimensions], dtype=_DTYPES[dtype], device=device)
        return self.collectives.gather_rows(rows, self.counts)

    def sum_gradients(
        self, compute: Callable[[], list[Tensor | None]], coefficients: Tensor, leaves: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Compute this rank's gradients and sum them over ranks.

        Args:
            compute: Returns the gradients from the poses of this rank, one per leaf, float32 or wider.
            coefficients: `dL/dy` of all poses, shape `(N, *prediction)`, the same on all ranks.
            leaves: The leaves.

        Returns:
            The sum for each leaf, or None if no pose of any rank reaches it.

        Raises:
            DistributedError: A rank failed, the ranks computed different losses, or a gradient is sparse.
        """
        with self.collectives.all_or_none("backward", 3 + len(leaves), maximum=True) as message:
            gradients = compute()
            checksum, magnitude = _checksum(coefficients)
            message.sent = [checksum, -checksum, magnitude, *map(_gradient_kind, gradients)]
        highest, negated_lowest, largest_magnitude, *kinds = message.received[0]
        if highest + negated_lowest > _SAME_LOSS_TOLERANCE * largest_magnitude:
            self._refuse_different_losses(checksum)
        if _SPARSE in kinds:
            raise DistributedError(
                "cannot sum gradients over ranks: a parameter has a sparse gradient, and only dense ones are summed. "
                "Use sparse=False in the embeddings of a model that runs with a process_group"
            )
        reached = [index for index, kind in enumerate(kinds) if kind]
        local = (_take_gradient(gradients, index, leaves[index]) for index in reached)
        for index, gradient in zip(reached, self.collectives.sum_tensors(local), strict=True):
            gradients[index] = gradient
        return gradients

    def _refuse_different_losses(self, checksum: float) -> None:
        with self.collectives.all_or_none("backward", 1) as message:
            message.sent = [checksum]
        checksums = [received for (received,) in message.received]
        rank = max(range(len(checksums)), key=lambda index: abs(checksums[index] - checksums[0]))
        raise DistributedError(
            f"rank {rank} computed a different loss than rank 0 for the same group: the checksum of the coefficients "
            f"is {checksums[rank]:.6g} on rank {rank} and {checksums[0]:.6g} on rank 0. Give all ranks of a "
            "process_group the same target and the same arguments of the combination, and the same random numbers in "
            "everything after the model"
        )


def _take_gradient(gradients: list[Tensor | None], index: int, leaf: Tensor) -> Tensor:
    """Remove a gradient from the list, so that it is freed with its bucket; zeros replace a missing one."""
    gradient, gradients[index] = gradients[index], None
    return torch.zeros_like(leaf, dtype=at_least_float32(leaf.dtype)) if gradient is None else gradient


def _checksum(coefficients: Tensor) -> list[float]:
    """Return a position-weighted checksum, which changes if two poses are swapped, and its magnitude."""
    rows = coefficients.detach().double().nan_to_num(0, 0, 0).reshape(len(coefficients), -1)
    terms = rows * torch.linspace(1, 2, len(rows), dtype=rows.dtype, device=rows.device).unsqueeze(1)
    sums: list[float] = torch.stack([terms.sum(), terms.abs().sum()]).tolist()
    return sums


def _describe_metadata(metadata: Sequence[float]) -> str:
    dimensions, dtype, *sizes = map(int, metadata[1:])
    return f"shape {tuple(sizes[:dimensions])}, {_DTYPES[dtype]}"


def _gradient_kind(gradient: Tensor | None) -> int:
    return _ABSENT if gradient is None else _SPARSE if gradient.is_sparse else _DENSE

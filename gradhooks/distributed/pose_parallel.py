"""Pose parallel: split the poses of a batch over ranks.

Each rank runs its own poses. Predictions are gathered, every rank computes the same combination and loss, each rank
runs the backward of its own poses, and the gradients are summed. Every rank ends with the gradients of a single process
that runs all poses.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.status import LIMIT, digest, pack, unpack
from gradhooks.errors import DistributedError, PredictionError
from gradhooks.numerics import at_least_float32

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_DIMENSIONS = 8
METADATA_LENGTH = 2 + _MAX_DIMENSIONS // 2
"""How many numbers `PosePartition.encode_metadata` returns for several ranks."""
_ABSENT, _DENSE, _SPARSE = range(3)
# In the status of the backward, which has room for five numbers of 48 bits.
_MASK_NUMBERS, _MASK_BITS = 5, 48
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
            `differentiable`, dtype and number of dimensions in one number, and the sizes, two in one number; in a
            single process, which needs no metadata, `differentiable` only.

        Raises:
            PredictionError: Unsupported dtype, or more than 8 dimensions.
        """
        if self.collectives.is_single:
            return [differentiable]
        sizes = rows.shape[1:]
        if len(sizes) > _MAX_DIMENSIONS or rows.dtype not in _DTYPES or max(sizes, default=0) >= LIMIT:
            raise PredictionError(
                f"cannot gather predictions of shape {tuple(sizes)} and {rows.dtype} over ranks; supported are at most "
                f"{_MAX_DIMENSIONS} dimensions of less than {LIMIT}, and {', '.join(map(str, _DTYPES))}. Convert them "
                "in call="
            )
        padded = [*sizes, *[0] * (_MAX_DIMENSIONS - len(sizes))]
        pairs = zip(padded[::2], padded[1::2], strict=True)
        return [differentiable, pack(_DTYPES.index(rows.dtype), len(sizes)), *(pack(*pair) for pair in pairs)]

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
        decoded = {rank: _decode(numbers) for rank, numbers in enumerate(metadata) if self.counts[rank]}
        distinct = set(decoded.values())
        if len(distinct) > 1:
            described = "; ".join(f"rank {rank}: shape {sizes}, {dtype}" for rank, (dtype, sizes) in decoded.items())
            raise PredictionError(
                f"predictions of one group differ in shape or dtype between ranks: {described}. Return the same shape "
                "and dtype for every pose, for example with call="
            )
        dtype, sizes = distinct.pop()
        if not len(rows):
            rows = torch.empty(0, *sizes, dtype=dtype, device=device)
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
        with self.collectives.all_or_none("backward") as message:
            gradients = compute()
            checksum, magnitude = _checksum(coefficients)
            kinds = [_gradient_kind(gradient) for gradient in gradients]
            message.sent = [checksum, magnitude, _SPARSE in kinds, *_encode_reached(kinds)]
        checksums, magnitudes, sparse, *encoded = zip(*message.received, strict=True)
        if max(checksums) - min(checksums) > _SAME_LOSS_TOLERANCE * max(magnitudes):
            _refuse_different_losses(checksums)
        if any(sparse):
            raise DistributedError(
                "cannot sum gradients over ranks: a parameter has a sparse gradient, and only dense ones are summed. "
                "Use sparse=False in the embeddings of a model that runs with a process_group"
            )
        if len(kinds) > _MASK_NUMBERS * _MASK_BITS:
            if len(set(encoded[0])) > 1:  # some poses reach parameters that those of other ranks do not
                kinds = self.collectives.maximum_of_bytes(kinds)
            reached = [index for index, kind in enumerate(kinds) if kind]
        else:
            reached = _decode_reached(encoded)
        local = (_take_gradient(gradients, index, leaves[index]) for index in reached)
        for index, gradient in zip(reached, self.collectives.sum_tensors(local), strict=True):
            gradients[index] = gradient
        return gradients


def _encode_reached(kinds: Sequence[int]) -> list[float]:
    """Return which leaves are reached, a bit for each; if there are too many leaves, a digest."""
    if len(kinds) > _MASK_NUMBERS * _MASK_BITS:
        return [digest(bytes(kinds))]
    mask = sum(1 << index for index, kind in enumerate(kinds) if kind)
    return [float(mask >> (_MASK_BITS * number) & (2**_MASK_BITS - 1)) for number in range(_MASK_NUMBERS)]


def _decode_reached(encoded: Sequence[Sequence[float]]) -> list[int]:
    """Return the leaves that are reached on any rank, from the numbers of all ranks."""
    masks = [functools.reduce(operator.or_, map(int, numbers)) for numbers in encoded]
    return [
        number * _MASK_BITS + bit for number, mask in enumerate(masks) for bit in range(_MASK_BITS) if mask >> bit & 1
    ]


def _refuse_different_losses(checksums: Sequence[float]) -> None:
    rank = max(range(len(checksums)), key=lambda index: abs(checksums[index] - checksums[0]))
    raise DistributedError(
        f"rank {rank} computed a different loss than rank 0 for the same group: the checksum of the coefficients is "
        f"{checksums[rank]:.6g} on rank {rank} and {checksums[0]:.6g} on rank 0. Give all ranks of a process_group the "
        "same target and the same arguments of the combination, and the same random numbers in everything after the "
        "model"
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


def _decode(metadata: Sequence[float]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape from the numbers of `PosePartition.encode_metadata`."""
    dtype, dimensions = unpack(metadata[1])
    sizes = [size for number in metadata[2:METADATA_LENGTH] for size in unpack(number)]
    return _DTYPES[dtype], tuple(sizes[:dimensions])


def _gradient_kind(gradient: Tensor | None) -> int:
    return _ABSENT if gradient is None else _SPARSE if gradient.is_sparse else _DENSE

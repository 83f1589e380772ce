"""PredictionDigest: a few numbers for each pose in place of a large prediction, by which two runs are compared.

A copy of embeddings that only serves a comparison is as large as their gradient. A digest consists of random sums of
the elements of a prediction, each divided by the difference that rounding explains (Johnson and Lindenstrauss, 1984).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.context import ForwardContext
from gradhooks.engine.drift import Rows, allowed_differences, coarsest_eps, refuse_worst
from gradhooks.numerics import at_least_float32

SUMS = 2
"""The numbers in the digest of a pose."""
WORTHWHILE = 8
"""A digest is made where it is smaller than the predictions by this factor."""
BLOCK_BYTES = 2**16
"""How many predictions are multiplied at once."""


class PredictionDigest(NamedTuple):
    """The digest of the predictions of all poses, which have `K` elements each.

    Attributes:
        sums: Shape `(N, SUMS)`, float32 or wider.
        factors: Shape `(SUMS, K)`.
        size: Shape `()`: the size of the largest element.
        like: Shape `(0,)`, in the dtype of the predictions.
    """

    sums: Tensor
    factors: Tensor
    size: Tensor
    like: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the predictions."""
        return self.like.dtype


def tensors_to_compare(predictions: Tensor) -> Sequence[Tensor]:
    """Return what a second run is compared with: the predictions, or the parts of their digest if it is much smaller.

    Args:
        predictions: Shape `(N, *prediction)`.
    """
    count, elements = len(predictions), predictions[:1].numel()
    is_smaller = count * elements > WORTHWHILE * SUMS * (count + elements)
    return _digest_of(predictions) if is_smaller else [predictions]


def first_run_of(tensors: Sequence[Tensor]) -> Tensor | PredictionDigest:
    """Return the predictions or the digest, given what `tensors_to_compare` has returned."""
    return tensors[0] if len(tensors) == 1 else PredictionDigest(*tensors)


def _digest_of(predictions: Tensor) -> PredictionDigest:
    dtype = at_least_float32(predictions.dtype)
    allowed, size = (tensor.to(dtype) for tensor in allowed_differences(predictions))
    random = torch.randn(SUMS, allowed.numel(), generator=torch.Generator().manual_seed(0), dtype=dtype)
    factors = random.to(allowed.device, non_blocking=True) / allowed.flatten().clamp(min=torch.finfo(dtype).tiny)
    rows = max(1, BLOCK_BYTES // predictions[:1].nbytes)
    sums = torch.cat([_sums(block, factors) for block in predictions.split(rows)])
    return PredictionDigest(sums, factors, size, predictions.new_empty(0))


def _sums(predictions: Tensor, factors: Tensor) -> Tensor:
    rows = predictions.flatten(1)  # not a matrix product, which may round to bfloat16 or TF32
    return torch.stack([(rows * each).sum(1) for each in factors], 1)


class DigestCheck:
    """Compares the predictions of a second run with the digest of the first. Waits for the device once.

    Args:
        context: The intercepted poses.
        digest: The digest of the first run.
        packed: Whether the poses run in other chunks than the first time.
    """

    def __init__(self, context: ForwardContext, digest: PredictionDigest, *, packed: bool) -> None:
        self._context = context
        self._digest = digest
        # Differences that are allowed add up as the steps of a random walk do.
        self._allowed: float | Tensor = digest.factors.shape[1] ** 0.5
        if packed:
            eps = coarsest_eps(context, digest.dtype)
            self._allowed = eps**0.75 * digest.size * torch.linalg.vector_norm(digest.factors, dim=1)
        self._rows: list[Rows] = []
        self._sums: list[Tensor] = []

    def add(self, rows: Rows, second: Tensor) -> None:
        """Take the predictions of some poses in the second run, shape `(n, *prediction)`."""
        self._rows.append(rows)
        self._sums.append(_sums(second, self._digest.factors))

    def refuse(self) -> None:
        """Raise an error if a prediction differs.

        Raises:
            ReplayError: A prediction differs by more than rounding explains.
        """
        if self._rows:
            refuse_worst(self._context, self._rows, self._digest.sums, torch.cat(self._sums), self._allowed)

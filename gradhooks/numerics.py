"""Precision and shapes: what sums of gradients and combinations share."""

import torch
from einops import rearrange
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or the wider of it and float32: the dtype of gradient sums and of what a combination gets."""
    return torch.promote_types(dtype, torch.float32)


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """Return `values`, shape `(N,)`, with axes of length 1 so that it broadcasts over `rows`, shape `(N, ...)`."""
    return rearrange(values, "n -> n" + " 1" * (rows.dim() - 1))

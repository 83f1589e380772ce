"""Precision and shapes: what sums of gradients and combinations share."""

import functools

import torch
from torch import Tensor


@functools.cache
def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or the wider of it and float32: the dtype of gradient sums and of what a combination gets."""
    return torch.promote_types(dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or wider."""
    dtype = at_least_float32(tensor.dtype)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """Return `values`, shape `(N,)`, with axes of length 1 so that it broadcasts over `rows`, shape `(N, ...)`."""
    return values if rows.dim() == 1 else values.view(-1, *(1,) * (rows.dim() - 1))


def on_host(*tensors: Tensor) -> list[Tensor]:
    """Return tensors on the CPU in float64, detached. Waits for each device once, however many tensors there are."""
    waiting: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        waiting.setdefault(tensor.device, []).append(index)
    results = [tensor.detach() for tensor in tensors]
    for device, indices in waiting.items():
        if device.type == "cpu" or len(indices) == 1:
            copies = [results[index].to("cpu", torch.float64) for index in indices]
        else:
            flat = [to_float64(results[index]).flatten() for index in indices]
            copies = list(torch.cat(flat).to("cpu", torch.float64).split([len(part) for part in flat]))
        for index, copied in zip(indices, copies, strict=True):
            results[index] = copied.view(tensors[index].shape)
    return results


def to_float64(tensor: Tensor) -> Tensor:
    """Convert to float64, or return `tensor` itself on a device without float64 (MPS).

    For the N predictions of a group, where float64 costs nothing: in float32, `scale * y` at a scale of 1000 rounds
    a coefficient by up to 7e-6 of its size.
    """
    return tensor if tensor.device.type == "mps" else tensor.to(torch.float64)


def largest_per_row(tensor: Tensor) -> Tensor:
    """Return the largest absolute value in each row of a real tensor, NaN if there is one, without a copy of it."""
    if tensor.dim() == 1:
        return tensor.abs()
    if tensor.numel() == tensor.shape[0]:
        return tensor.reshape(-1).abs()
    smallest, largest = tensor.reshape(len(tensor), -1).aminmax(dim=1)
    return torch.maximum(largest, -smallest)


def even_size(count: int, most: int) -> int:
    """Return the size of chunks of at most `most` that share `count` evenly."""
    return -(-count // -(-count // most))

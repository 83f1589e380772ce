"""Groups of poses for tests, and the slow, plain way to combine them."""

from collections.abc import Callable

import torch
from torch import Tensor

INDICES = [
    [0],
    [0, 0, 0],
    [0, 1, 2],
    [2, 1, 0],
    [0, 0, 1, 1, 1],
    [3, 0, 2, 0, 1, 3, 3, 0, 2, 0],
]
"""One group, a group per pose, sorted, reversed, interleaved and ragged."""

EMPTY = [2, 0, 2]
"""The groups 1 and 3 of four have no poses."""


def one_by_one(combination: Callable[[Tensor], Tensor], values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Combine one group after the other in plain PyTorch."""
    return torch.stack([combination(values[groups == number]) for number in range(count)])

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where that is wider: what combinations see, and in what gradients are summed."""
    return torch.promote_types(dtype, torch.float32)

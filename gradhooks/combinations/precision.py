import torch
from torch import Tensor


def widest(predictions: Tensor) -> Tensor:
    """`predictions` in the widest float their device has.

    N numbers cost nothing, and `scale * y` in float32 is rounded by up to 7e-6 of a coefficient at scale 1000.
    """
    return predictions if predictions.device.type == "mps" else predictions.to(torch.float64)

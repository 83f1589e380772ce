"""SharedMemory: predictions that the user gets in the memory of those that are saved for the backward."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SharedMemory:
    """Notices that the user changed predictions in place whose memory is that of saved ones.

    Args:
        for_user: An alias of the predictions with their version, but without their graph.
        shares: For each saved tensor, whether it shares the memory.
    """

    def __init__(self, for_user: Tensor, shares: Sequence[bool]) -> None:
        self._for_user = for_user
        self._version = for_user._version
        self._shares = shares

    def without_changed(self, saved: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the saved tensors; NaN, of which nothing is expected, for predictions that are overwritten."""
        if self._for_user._version == self._version:
            return saved
        return [
            tensor.new_full((), torch.nan).expand_as(tensor) if shares else tensor
            for tensor, shares in zip(saved, self._shares, strict=True)
        ]

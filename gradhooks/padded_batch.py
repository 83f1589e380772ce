"""Take the poses out of a padded batch, for `Groups.from_padded`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradhooks.errors import PosesError


def unpad(poses: Tensor | Mapping[str, Any], mask: Tensor) -> tuple[Tensor | dict[str, Any], Tensor, int]:
    """Return the poses, the group of each and the number of groups.

    Args:
        poses: Shape `(B, L, ...)`, or a mapping of such tensors, or of such mappings.
        mask: Which places hold a pose, boolean, shape `(B, L)`.

    Raises:
        PosesError: The mask is not boolean or has another shape than the first two axes of the poses.
    """
    _check_mask(mask)
    places = mask.flatten().nonzero().squeeze(1)
    return _take(poses, mask, places, "the poses"), (places // mask.shape[1]).cpu(), len(mask)


def _take(poses: Any, mask: Tensor, places: Tensor, name: str) -> Any:
    if isinstance(poses, Mapping) and poses:
        return {key: _take(column, mask, places, f"poses[{key!r}]") for key, column in poses.items()}
    if not isinstance(poses, Tensor):
        raise PosesError(
            f"{name} must be a tensor of shape (B, L, ...) or a mapping of such tensors, got {type(poses).__name__}"
        )
    if poses.shape[:2] != mask.shape:
        raise PosesError(
            f"the mask must have the shape of the first two axes of the poses: {name} has shape "
            f"{tuple(poses.shape)}, the mask {tuple(mask.shape)}"
        )
    return poses.flatten(0, 1).index_select(0, places.to(poses.device))


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = f"{mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise PosesError(f"the mask must be a boolean tensor, true where there is a pose, got {found}; use mask.bool()")
    if mask.dim() != 2 or 0 in mask.shape:  # noqa: PLR2004
        raise PosesError(f"the mask must have shape (B, L), with a place at least, got {tuple(mask.shape)}")

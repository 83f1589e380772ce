"""PaddedGroups: groups of unequal size as one batch of shape `(B, L, ...)` with a mask, and back."""

import torch
from torch import Tensor

from gradhooks.group_index import GroupIndex
from gradhooks.group_reductions import expand_groups


class PaddedGroups:
    """Lay out the poses of a batch in B rows of L places, L being the size of the largest group.

    A place without a pose repeats the first pose of its group, so that no number appears there that the group does not
    have: a maximum, or a NaN of another kind, cannot come from the padding.

    Args:
        groups: The group of each pose. No group is empty.
        device: Where `pad` and `unpad` find their tensors.

    Attributes:
        mask: Which places hold a pose, boolean, shape `(B, L)`.
    """

    def __init__(self, groups: GroupIndex, device: torch.device) -> None:
        sizes = torch.tensor(groups.sizes)
        places = torch.arange(int(sizes.max()))
        mask = places < sizes.unsqueeze(1)
        starts = sizes.cumsum(0) - sizes
        sorted_poses = torch.cat(groups.rows())
        poses = sorted_poses[starts.unsqueeze(1) + places.where(mask, torch.tensor(0))]
        place_of_pose = torch.empty_like(sorted_poses)
        place_of_pose[sorted_poses] = mask.flatten().nonzero().squeeze(1)
        self.mask, self._poses, self._places = (
            part.to(device, non_blocking=True) for part in (mask, poses, place_of_pose)
        )

    def pad(self, rows: Tensor) -> Tensor:
        """Lay out a row per pose, shape `(M, ...)`, as `(B, L, ...)`."""
        poses = self._poses.to(rows.device)
        return expand_groups(rows, poses.flatten()).view(*poses.shape, *rows.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """Return the row of each pose, shape `(M, ...)`, from `(B, L, ...)`."""
        return expand_groups(padded.flatten(0, 1), self._places)

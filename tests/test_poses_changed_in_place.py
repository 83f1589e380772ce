"""A model that changes its pose in place is refused, because the second run would get another pose."""

import pytest
import torch
from torch import Tensor, nn
from training_reference import ACCUMULATORS

import gradhooks


class ChangesItsPose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, atoms: dict[str, Tensor]) -> Tensor:
        atoms["positions"].mul_(2)
        return self.linear(atoms["positions"])


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_pose_changed_in_place_is_refused_by_key(accumulator: str) -> None:
    scorer = gradhooks.MultiPose(
        ChangesItsPose(), memory=0, accumulator=accumulator, call=lambda model, pose: model(pose)
    )
    with pytest.raises(gradhooks.errors.PosesError, match=r"pose 0: the model changed pose\['positions'\] in place"):
        scorer([{"positions": torch.randn(4)} for _ in range(3)])

"""Groups.from_padded: padded batches with a mask, as tensors and mappings."""

from typing import Any

import pytest
import torch
from model_zoo import TensorFactory
from torch import Tensor, nn

from gradhooks import Groups, MultiPose
from gradhooks.errors import PosesError

MASK = torch.tensor([[True, True, False], [True, True, True], [False, True, False]])


def by_rows(poses: Tensor) -> list[Tensor]:
    return [rows[keep] for rows, keep in zip(poses, MASK.to(poses.device), strict=True)]


@pytest.mark.parametrize("memory", ["1GiB", 0])
def test_gradients_are_those_of_the_full_graph(memory: Any, double: TensorFactory) -> None:
    """Padding plays no part: it is NaN here. The poses are differentiable, and on the device of the model."""
    model = nn.Linear(4, 2).to(double.device, double.dtype)
    poses = double.randn(3, 3, 4)
    poses[~MASK.to(poses.device)] = torch.nan
    results = []
    for native in (True, False):
        model.zero_grad()
        leaf = poses.clone().requires_grad_()
        if native:
            combined = torch.stack([model(rows).mean(0) for rows in by_rows(leaf)])
        else:
            prediction = MultiPose(model, "mean", memory=memory)(Groups.from_padded(leaf, MASK.to(leaf.device)))
            combined = prediction.combined
            assert prediction.groups.tolist() == [0, 0, 1, 1, 1, 2]  # type: ignore[union-attr]
        (combined.square().sum(1) * torch.arange(1, 4, device=combined.device)).sum().backward()
        assert leaf.grad is not None
        results.append([combined, leaf.grad, *[parameter.grad for parameter in model.parameters()]])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_mappings(double: TensorFactory) -> None:
    poses = {"positions": double.randn(3, 3, 5, 2), "graph": {"charge": torch.arange(9).view(3, 3)}}
    groups = Groups.from_padded(poses, MASK)
    assert torch.equal(groups.poses["positions"], torch.cat(by_rows(poses["positions"])))  # type: ignore[arg-type]
    assert groups.poses["graph"]["charge"].tolist() == [0, 1, 3, 4, 5, 7]
    assert (groups.count, len(groups), groups.index.device.type) == (3, 6, "cpu")


def test_a_group_without_poses() -> None:
    mask = MASK.clone()
    mask[1:] = False
    groups = Groups.from_padded(torch.randn(3, 3, 2), mask)
    assert (groups.count, groups.index.tolist()) == (3, [0, 0])
    with pytest.raises(PosesError, match="no pose is in group 1, 2"):
        MultiPose(nn.Linear(2, 1))(groups)
    assert len(Groups.from_padded(torch.randn(3, 3, 2), torch.zeros(3, 3, dtype=torch.bool))) == 0


@pytest.mark.parametrize(
    ("poses", "mask", "message"),
    [
        (
            torch.zeros(3, 3),
            MASK.long(),
            r"boolean tensor, true where there is a pose, got torch\.int64; use mask\.bool",
        ),
        (torch.zeros(3, 3), MASK.tolist(), "boolean tensor, true where there is a pose, got list"),
        (torch.zeros(3, 3), MASK[0], r"must have shape \(B, L\), with a place at least, got \(3,\)"),
        (torch.zeros(0, 3), MASK[:0], r"with a place at least, got \(0, 3\)"),
        (torch.zeros(3, 2, 4), MASK, r"the poses has shape \(3, 2, 4\), the mask \(3, 3\)"),
        ({"a": torch.zeros(3, 3), "b": torch.zeros(9)}, MASK, r"poses\['b'\] has shape \(9,\), the mask \(3, 3\)"),
        (
            {"a": torch.zeros(3, 3), "b": [1]},
            MASK,
            r"poses\['b'\] must be a tensor of shape \(B, L, \.\.\.\) .*got list",
        ),
        ({}, MASK, "the poses must be a tensor .*got dict"),
    ],
)
def test_what_is_no_padded_batch_is_refused(poses: Any, mask: Any, message: str) -> None:
    with pytest.raises(PosesError, match=message):
        Groups.from_padded(poses, mask)

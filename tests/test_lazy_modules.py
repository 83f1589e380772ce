"""Lazy modules are initialized by the first group, as by the first plain forward."""

import pytest
import torch
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import ACCUMULATORS

import gradhooks
from gradhooks.testing import full_graph


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pose: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(pose)).tanh())).mean(0)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_lazy_modules(accumulator: str) -> None:
    poses = [torch.randn(5, 4) for _ in range(6)]
    model, reference = Lazy(), Lazy()
    manual_seed(3)
    full_graph(reference, poses, gradhooks.combinations.Min(scale=1.0)).combined.sum().backward()
    # The plain first forward draws dropout masks between initializing the layers, so only the first weight is equal.
    manual_seed(3)
    gradhooks.MultiPose(model, gradhooks.combinations.Min(scale=1.0), accumulator=accumulator)(
        poses
    ).combined.sum().backward()
    torch.testing.assert_close(model.first.weight, reference.first.weight)
    assert model.training
    assert model.norm.num_batches_tracked == 6
    assert all(leaf.grad is not None for leaf in model.parameters())

"""A small model in float64 with its poses, on the device of the tests; for tests that need no special architecture."""

import torch
from chosen_device import DEVICE
from torch import Tensor, nn


def small_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE, torch.float64)


def random_poses(count: int = 6) -> list[Tensor]:
    return [torch.randn(4, dtype=torch.float64).to(DEVICE) for _ in range(count)]


def assert_gradients_close(model: nn.Module, reference: nn.Module) -> None:
    for leaf, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert (leaf.grad is None) == (expected.grad is None)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-10, atol=1e-13)

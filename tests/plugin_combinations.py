"""Combinations with trained parameters, as a plugin may define them."""

import torch
from torch import Tensor, nn

import gradhooks


class AttentionPooling(nn.Module):
    """A plugin with a trained parameter, which declares no log-weights."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.tensor([0.7, -0.3]))

    def forward(self, predictions: Tensor) -> Tensor:
        scores = self.query[0] * predictions + self.query[1] * predictions.square()
        return (torch.softmax(scores, 0) * predictions).sum(0)


class LearnedSoftMinimum(gradhooks.Combination):
    """A plugin with a trained parameter, which declares its log-weights."""

    def __init__(self) -> None:
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, predictions: Tensor) -> Tensor:
        return -torch.logsumexp(-self.steepness * predictions.double(), 0).to(predictions.dtype) / self.steepness

    def stream_weights(self, predictions: Tensor) -> gradhooks.StreamWeights:
        return gradhooks.StreamWeights(log_weights=-self.steepness.detach() * predictions)

"""Skipped poses leave their rows in sparse gradients, as zeros, so that `SparseAdam` trains as with the full graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS_AND_PLAIN,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    options_of,
)

import gradhooks
from gradhooks.testing import full_graph

Pose = tuple[Tensor, float]
STEPS = 3


class Words(nn.Module):
    """Sparse embeddings, for poses that have a word."""

    def __init__(self, *, bag: bool) -> None:
        super().__init__()
        kind: Any = nn.EmbeddingBag if bag else nn.Embedding
        self.embedding, self.last = kind(9, 3, sparse=True, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, word: Tensor, height: float) -> Tensor:
        hidden = torch.full((1, 3), height, dtype=torch.float64)
        if word >= 0:
            hidden = hidden + 0.01 * self.embedding(word.view(1, -1)).view(1, 3)
        return self.last(hidden)[0] + height


def poses_of(words: list[int], heights: list[float], step: int) -> list[Pose]:
    return [
        (torch.tensor((word + step) % 9 if word >= 0 else -1), height)
        for word, height in zip(words, heights, strict=True)
    ]


POSES: dict[str, tuple[list[int], list[float]]] = {
    "all use it": ([0, 3, 6, 1], [0.0, 0.1, 0.2, 0.3]),
    "skipped ones use it": ([-1, -1, 3, 1], [0.0, 0.1, 40.0, 50.0]),
    "others have other words": ([0, 1, 4, 7], [0.0, 10.0, 20.0, 30.0]),
    "the last one matters": ([0, 1, 4, 7], [30.0, 20.0, 10.0, 0.0]),
}
LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "combined": lambda prediction: prediction.combined.square().sum(),
    "first pose": lambda prediction: prediction.per_pose[0].sum(),
    "zero": lambda prediction: (0 * prediction.combined).sum(),
}


def train(words: str, loss: str, score_of: Callable[[nn.Module], Any], *, bag: bool) -> tuple[list[Gradients], Tensor]:
    torch.manual_seed(0)
    model = Words(bag=bag)
    weights: Tensor = model.embedding.weight
    optimizer, score, gradients = torch.optim.SparseAdam([weights], lr=0.1), score_of(model), []
    for step in range(STEPS):
        model.zero_grad()
        LOSSES[loss](score(poses_of(*POSES[words], step))).backward()
        gradients.append(gradients_of(dict(model.named_parameters())))
        optimizer.step()
    return gradients, weights


@pytest.mark.parametrize("words", POSES)
@pytest.mark.parametrize("combination", ["mean", "min"])
def test_sparse_adam_trains_as_with_the_full_graph(combination: str, words: str) -> None:
    combiner = gradhooks.registry.combinations.create(combination)
    for loss in LOSSES:
        bag = loss == "combined"
        expected = train(words, loss, lambda model: lambda poses: full_graph(model, poses, combiner), bag=bag)
        for accumulator in ACCUMULATORS_AND_PLAIN:
            with case_label(loss, accumulator):
                options = options_of(accumulator)
                found = train(
                    words, loss, lambda model, options=options: gradhooks.MultiPose(model, combiner, **options), bag=bag
                )
                for result, wanted in zip(found[0], expected[0], strict=True):
                    assert_same_gradients(result, wanted)
                torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-13)

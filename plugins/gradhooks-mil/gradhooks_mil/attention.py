"""Means of embeddings with learned weights."""

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from gradhooks import Combination, Combined
from gradhooks.errors import CombinationError
from gradhooks.group_reductions import group_softmax, group_sum


class Attention(Combination):
    """Compute the mean of embeddings with learned weights, `h = sum_i a_i h_i` with `a = softmax_i(w . tanh(V h_i))`.

    The linear map `V` has a bias, which the paper leaves out. Not streamable, since a prediction is a vector. Source:
    Ilse, Tomczak and Welling, Attention-based deep multiple instance learning, arXiv:1802.04712, eq. 8.

    Args:
        features: Length of an embedding `h_i`; 1 for predictions of one number.
        hidden: Number of rows of `V`.
        return_attention: Return the `a_i`, too, shape `(N,)`; they are then `prediction.attention`.
    """

    example_options: ClassVar[dict[str, Any]] = {"features": 3}

    def __init__(self, features: int, hidden: int = 128, return_attention: bool = False) -> None:
        super().__init__()
        self.features = features
        self.return_attention = return_attention
        self.hidden = nn.Linear(features, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # a bias would cancel in the softmax

    def activation(self, embeddings: Tensor) -> Tensor:
        """Compute `tanh(V h_i)`, shape `(N, hidden)`, from embeddings of shape `(N, features)`."""
        activation: Tensor = self.hidden(embeddings)
        return activation.tanh()

    def forward(self, predictions: Tensor) -> Tensor | Combined:
        embeddings, scores = self._embeddings_and_scores(predictions)
        attention = torch.softmax(scores, dim=0).to(predictions.dtype)
        return self._with_attention((attention * embeddings).sum(0).view(predictions.shape[1:]), attention)

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor | Combined:
        embeddings, scores = self._embeddings_and_scores(predictions)
        attention = group_softmax(scores, groups, count).to(predictions.dtype)
        result = group_sum(attention * embeddings, groups, count).view(count, *predictions.shape[1:])
        return self._with_attention(result, attention)

    def _with_attention(self, result: Tensor, attention: Tensor) -> Tensor | Combined:
        return Combined(result, (attention.squeeze(1),)) if self.return_attention else result

    def _embeddings_and_scores(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings, shape `(N, features)`, and a score for each, shape `(N, 1)`."""
        embeddings = rearrange(predictions, "n ... -> n (...)")
        if embeddings.shape[1] != self.features:
            name = type(self).__name__
            raise CombinationError(
                f"{name} expects predictions of {self.features} features, got {embeddings.shape[1]}; create it with "
                f"{name}(features={embeddings.shape[1]})"
            )
        # The scores have the dtype of the parameters, which is narrower than the predictions' in a bfloat16 model.
        return embeddings, self.score(self.activation(embeddings.to(self.score.weight.dtype)))

    def example(self, count: int) -> Tensor:
        """Return embeddings for the conformance checks."""
        return torch.randn(count, self.features)


class GatedAttention(Attention):
    """Compute attention with a gate, `h = sum_i a_i h_i` with `a = softmax_i(w . (tanh(V h_i) * sigmoid(U h_i)))`.

    The linear maps `V` and `U` have biases, which the paper leaves out. Source: Ilse, Tomczak and Welling,
    arXiv:1802.04712, eq. 9.

    Args:
        features: Length of an embedding `h_i`; 1 for predictions of one number.
        hidden: Number of rows of `V` and of `U`.
        return_attention: Return the `a_i`, too, shape `(N,)`; they are then `prediction.attention`.
    """

    def __init__(self, features: int, hidden: int = 128, return_attention: bool = False) -> None:
        super().__init__(features, hidden, return_attention)
        self.gate = nn.Linear(features, hidden)

    def activation(self, embeddings: Tensor) -> Tensor:
        """Compute `tanh(V h_i) * sigmoid(U h_i)`, shape `(N, hidden)`, from embeddings of shape `(N, features)`."""
        gate: Tensor = self.gate(embeddings)
        return super().activation(embeddings) * gate.sigmoid()

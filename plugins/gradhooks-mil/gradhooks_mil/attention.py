import torch
from torch import Tensor, nn

from gradhooks import Combination
from gradhooks.errors import CombinationError


class Attention(Combination):
    """Learned weighted mean of embeddings: `h = sum_i a_i h_i`, `a = softmax_i(w . tanh(V h_i))`.

    Not streamable, since a prediction is a vector. Biases are learned besides. Source: Ilse, Tomczak and Welling,
    Attention-based deep multiple instance learning, arXiv:1802.04712, eq. 7 and 8.

    Args:
        features: Length of an embedding `h_i`. With 1, predictions that are single numbers will do too.
        hidden: Rows of `V`.
    """

    def __init__(self, features: int = 1, hidden: int = 128) -> None:
        super().__init__()
        self.features = features
        self.hidden = nn.Linear(features, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # a bias would cancel in the softmax

    def scores(self, embeddings: Tensor) -> Tensor:
        """`w . tanh(V h_i)`, shape `(N, 1)`, of embeddings of shape `(N, features)`."""
        scores: Tensor = self.score(self.activation(embeddings))
        return scores

    def activation(self, embeddings: Tensor) -> Tensor:
        """What is scored, shape `(N, hidden)`."""
        activation: Tensor = self.hidden(embeddings)
        return activation.tanh()

    def forward(self, predictions: Tensor) -> Tensor:
        embeddings = predictions.reshape(len(predictions), -1)
        if embeddings.shape[1] != self.features:
            raise CombinationError(
                f"{type(self).__name__} was made for embeddings of {self.features} features, and a prediction has "
                f"{embeddings.shape[1]}; say {type(self).__name__}(features={embeddings.shape[1]})"
            )
        # In the parameters' precision, which is narrower than the predictions' where the model is bfloat16.
        attention = torch.softmax(self.scores(embeddings.to(self.score.weight.dtype)), dim=0)
        return (attention.to(predictions.dtype) * embeddings).sum(0).view(predictions.shape[1:])

    def example(self, count: int) -> Tensor:
        """For the conformance kit."""
        return torch.randn(count, self.features)


class GatedAttention(Attention):
    """Attention with a gate: `h = sum_i a_i h_i`, `a = softmax_i(w . (tanh(V h_i) * sigmoid(U h_i)))`.

    Source: Ilse, Tomczak and Welling, arXiv:1802.04712, eq. 9.

    Args:
        features: Length of an embedding `h_i`. With 1, predictions that are single numbers will do too.
        hidden: Rows of `V` and of `U`.
    """

    def __init__(self, features: int = 1, hidden: int = 128) -> None:
        super().__init__(features, hidden)
        self.gate = nn.Linear(features, hidden)

    def activation(self, embeddings: Tensor) -> Tensor:
        """What is scored, shape `(N, hidden)`."""
        gate: Tensor = self.gate(embeddings)
        return super().activation(embeddings) * gate.sigmoid()

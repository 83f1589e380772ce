"""Ordinary architectures, and outputs of several shapes."""

import torch
from chosen_device import needs
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, mlp, model_case, rows_of


@model_case()
def plain_mlp(factory: TensorFactory) -> ModelCase:
    return ModelCase(mlp(4, 8, 1), rows_of(factory.randn(MOST_POSES, 4)))


class Summed(nn.Module):
    """Reduces the output to a scalar without axes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pose: Tensor) -> Tensor:
        return self.inner(pose).sum()


@model_case()
def scalar_output(factory: TensorFactory) -> ModelCase:
    return ModelCase(Summed(mlp(4, 8, 3)), rows_of(factory.randn(MOST_POSES, 4)))


@model_case()
def vector_output(factory: TensorFactory) -> ModelCase:
    return ModelCase(mlp(4, 8, 3), rows_of(factory.randn(MOST_POSES, 4)))


@model_case()
def matrix_output(factory: TensorFactory) -> ModelCase:
    return ModelCase(mlp(4, 8, 3), rows_of(factory.randn(MOST_POSES, 2, 4)))


class ConvNet(nn.Module):
    def __init__(self, normalisation: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), normalisation(4), nn.ReLU(), nn.Conv2d(4, 4, 3), normalisation(4), nn.GELU()
        )
        self.head = nn.Linear(4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image.unsqueeze(0)).mean((2, 3))).squeeze(0)


@model_case()
def batch_norm_in_training(factory: TensorFactory) -> ModelCase:
    return ModelCase(ConvNet(nn.BatchNorm2d), rows_of(factory.randn(MOST_POSES, 2, 6, 6)))


@model_case()
def batch_norm_in_evaluation(factory: TensorFactory) -> ModelCase:
    return ModelCase(ConvNet(nn.BatchNorm2d).eval(), rows_of(factory.randn(MOST_POSES, 2, 6, 6)))


@model_case()
def channels_last(factory: TensorFactory) -> ModelCase:
    model = ConvNet(nn.Identity).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ModelCase(model, rows_of(factory.randn(MOST_POSES, 2, 6, 6)))


class Recurrent(nn.Module):
    def __init__(self, cell: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(width, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.cell(sequence)[0][-1])


@model_case(bit_for_bit=False)
def lstm(factory: TensorFactory) -> ModelCase:
    return ModelCase(Recurrent(nn.LSTM(3, 4), 4), rows_of(factory.randn(MOST_POSES, 5, 3)))


@model_case(bit_for_bit=False)
def gru_of_two_directions_and_layers(factory: TensorFactory) -> ModelCase:
    model = Recurrent(nn.GRU(3, 4, num_layers=2, bidirectional=True), 8)
    return ModelCase(model, rows_of(factory.randn(MOST_POSES, 5, 3)))


@model_case(bit_for_bit=False, same_in_every_dtype=False)
def lstm_with_dropout(factory: TensorFactory) -> ModelCase:
    return ModelCase(Recurrent(nn.LSTM(3, 4, num_layers=2, dropout=0.5), 4), rows_of(factory.randn(MOST_POSES, 5, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(tokens.unsqueeze(0)).mean(1)).squeeze(0)


@model_case()
def transformer_encoder(factory: TensorFactory) -> ModelCase:
    return ModelCase(Encoder(), rows_of(factory.randn(MOST_POSES, 5, 8)))


@model_case(bit_for_bit=False)  # without a graph, PyTorch uses a fused kernel here
def transformer_encoder_in_evaluation(factory: TensorFactory) -> ModelCase:
    return ModelCase(Encoder().eval(), rows_of(factory.randn(MOST_POSES, 5, 8)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(0))


@model_case()
def multi_head_attention(factory: TensorFactory) -> ModelCase:
    return ModelCase(Attention(), rows_of(factory.randn(MOST_POSES, 5, 8)))


class WordBag(nn.Module):
    def __init__(self, *, sparse: bool, max_norm: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4, sparse=sparse, max_norm=max_norm)
        self.head = nn.Linear(4, 1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).tanh().mean(0))


@model_case()
def dense_embedding(factory: TensorFactory) -> ModelCase:
    return ModelCase(WordBag(sparse=False), rows_of(factory.randint(11, MOST_POSES, 5)))


@model_case()
def sparse_embedding(factory: TensorFactory) -> ModelCase:
    needs("sparse tensors")
    return ModelCase(WordBag(sparse=True), rows_of(factory.randint(11, MOST_POSES, 5)))


class SparseAndDense(nn.Module):
    """The embedding's weight gets a sparse gradient by its lookup and a dense one by its use as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4, sparse=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.embedding(words).tanh().sum() + (words[0] % 2) * self.embedding.weight.square().mean()


@model_case(bit_for_bit=False)
def sparse_and_dense_embedding(factory: TensorFactory) -> ModelCase:
    needs("sparse tensors")
    return ModelCase(SparseAndDense(), rows_of(factory.randint(11, MOST_POSES, 5)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.shift = nn.Parameter(torch.randn(6))
        self.second = nn.Linear(6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose)
        hidden.mul_(1.5).add_(self.shift)
        hidden[::2] += self.shift[1::2].sigmoid()
        F.relu_(hidden)
        return self.second(hidden).clamp_(-3, 3)


@model_case(bit_for_bit=False)
def in_place_operations(factory: TensorFactory) -> ModelCase:
    return ModelCase(InPlace(), rows_of(factory.randn(MOST_POSES, 4)))


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))
        self.head = nn.Linear(5, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.head((self.mix @ pose.to(self.mix.dtype)).abs().square())


@model_case()
def complex_parameters(factory: TensorFactory) -> ModelCase:
    needs("complex numbers")
    return ModelCase(Waves(), rows_of(factory.randn(MOST_POSES, 4)))

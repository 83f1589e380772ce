"""Architectures by their layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from model_zoo.specimen import MOST_POSES, Place, Specimen, mlp, some_of, species


@species()
def plain_mlp(place: Place) -> Specimen:
    return Specimen(mlp(4, 8, 1), some_of(place.randn(MOST_POSES, 4)))


class Summed(nn.Module):
    """Makes the prediction a number without axes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pose: Tensor) -> Tensor:
        return self.inner(pose).sum()


@species()
def scalar_output(place: Place) -> Specimen:
    return Specimen(Summed(mlp(4, 8, 3)), some_of(place.randn(MOST_POSES, 4)))


@species()
def vector_output(place: Place) -> Specimen:
    return Specimen(mlp(4, 8, 3), some_of(place.randn(MOST_POSES, 4)))


@species()
def matrix_output(place: Place) -> Specimen:
    return Specimen(mlp(4, 8, 3), some_of(place.randn(MOST_POSES, 2, 4)))


class ConvNet(nn.Module):
    def __init__(self, normalisation: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), normalisation(4), nn.ReLU(), nn.Conv2d(4, 4, 3), normalisation(4), nn.GELU()
        )
        self.head = nn.Linear(4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image.unsqueeze(0)).mean((2, 3))).squeeze(0)


@species()
def batch_norm_in_training(place: Place) -> Specimen:
    return Specimen(ConvNet(nn.BatchNorm2d), some_of(place.randn(MOST_POSES, 2, 6, 6)))


@species()
def batch_norm_in_evaluation(place: Place) -> Specimen:
    return Specimen(ConvNet(nn.BatchNorm2d).eval(), some_of(place.randn(MOST_POSES, 2, 6, 6)))


@species()
def channels_last(place: Place) -> Specimen:
    model = ConvNet(nn.Identity).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Specimen(model, some_of(place.randn(MOST_POSES, 2, 6, 6)))


class Recurrent(nn.Module):
    def __init__(self, cell: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(width, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.cell(sequence)[0][-1])


@species(bit_for_bit=False)
def lstm(place: Place) -> Specimen:
    return Specimen(Recurrent(nn.LSTM(3, 4), 4), some_of(place.randn(MOST_POSES, 5, 3)))


@species(bit_for_bit=False)
def gru_of_two_directions_and_layers(place: Place) -> Specimen:
    model = Recurrent(nn.GRU(3, 4, num_layers=2, bidirectional=True), 8)
    return Specimen(model, some_of(place.randn(MOST_POSES, 5, 3)))


@species(bit_for_bit=False, same_in_every_dtype=False)
def lstm_with_dropout(place: Place) -> Specimen:
    return Specimen(Recurrent(nn.LSTM(3, 4, num_layers=2, dropout=0.5), 4), some_of(place.randn(MOST_POSES, 5, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(tokens.unsqueeze(0)).mean(1)).squeeze(0)


@species()
def transformer_encoder(place: Place) -> Specimen:
    return Specimen(Encoder(), some_of(place.randn(MOST_POSES, 5, 8)))


@species(bit_for_bit=False)  # without a graph, PyTorch takes a fused kernel here
def transformer_encoder_in_evaluation(place: Place) -> Specimen:
    return Specimen(Encoder().eval(), some_of(place.randn(MOST_POSES, 5, 8)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(0))


@species()
def multi_head_attention(place: Place) -> Specimen:
    return Specimen(Attention(), some_of(place.randn(MOST_POSES, 5, 8)))


class WordBag(nn.Module):
    def __init__(self, *, sparse: bool, max_norm: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4, sparse=sparse, max_norm=max_norm)
        self.head = nn.Linear(4, 1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).tanh().mean(0))


@species()
def dense_embedding(place: Place) -> Specimen:
    return Specimen(WordBag(sparse=False), some_of(place.integers(11, MOST_POSES, 5)))


@species()
def sparse_embedding(place: Place) -> Specimen:
    return Specimen(WordBag(sparse=True), some_of(place.integers(11, MOST_POSES, 5)))


class SparseAndDense(nn.Module):
    """The embedding's weight gets a sparse gradient here and a dense one there."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4, sparse=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.embedding(words).tanh().sum() + (words[0] % 2) * self.embedding.weight.square().mean()


@species(bit_for_bit=False)
def sparse_and_dense_embedding(place: Place) -> Specimen:
    return Specimen(SparseAndDense(), some_of(place.integers(11, MOST_POSES, 5)))


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


@species(bit_for_bit=False)
def in_place_operations(place: Place) -> Specimen:
    return Specimen(InPlace(), some_of(place.randn(MOST_POSES, 4)))


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))
        self.head = nn.Linear(5, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.head((self.mix @ pose.to(self.mix.dtype)).abs().square())


@species()
def complex_parameters(place: Place) -> Specimen:
    return Specimen(Waves(), some_of(place.randn(MOST_POSES, 4)))

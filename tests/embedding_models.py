"""Encoders and contrastive losses for tests of embeddings."""

from collections.abc import Iterable, Sequence

import torch
from seeding import manual_seed
from torch import Tensor, nn

WIDTH = 16
FEATURES = 6


def encoder(seed: int = 0) -> nn.Module:
    """Return an encoder with dropout, in float64."""
    manual_seed(seed)
    layers = nn.Linear(FEATURES, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, WIDTH)
    return nn.Sequential(*layers).double()


def inputs(count: int, seed: int) -> Tensor:
    return torch.randn(count, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_chunks(model: nn.Module, poses: Tensor, size: int) -> Tensor:
    """Return the embeddings of chunks that run one after the other, in one graph."""
    return torch.cat([model(chunk) for chunk in poses.split(size)])


def info_nce(queries: Tensor, passages: Tensor, temperature: float = 0.2) -> Tensor:
    """Return the loss of both directions; passages beyond the number of queries are hard negatives."""
    queries = nn.functional.normalize(queries, dim=-1)
    passages = nn.functional.normalize(passages, dim=-1)
    scores = queries @ passages.T / temperature
    labels = torch.arange(len(queries), device=queries.device)
    backwards = nn.functional.cross_entropy(scores[:, : len(queries)].T, labels)
    return (nn.functional.cross_entropy(scores, labels) + backwards) / 2


class TokenEncoder(nn.Module):
    """Embeds padded sequences: attention over the tokens that are no padding, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        tokens = self.tokens(ids)
        mixed, _ = self.attention(tokens, tokens, tokens, key_padding_mask=padding, need_weights=False)
        kept = (~padding).unsqueeze(-1).to(mixed)
        return self.head((mixed * kept).sum(1) / kept.sum(1))


def token_encoder() -> TokenEncoder:
    manual_seed(5)
    return TokenEncoder().double()


def sequences(lengths: Iterable[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, 50, (length,), generator=generator) for length in lengths]


def pad(poses: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(poses), batch_first=True)

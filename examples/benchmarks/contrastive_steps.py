"""One contrastive step in the ways that users write it: the full graph, checkpoints, two passes, libraries, gradhooks.

Each function takes an encoder and the size of a chunk, and returns the step, which fills `.grad`. Their bodies are what
a user writes, and are counted as such.
"""

import ast
import inspect
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradhooks import MultiPose

SCALE = 20.0
Step = Callable[[Tensor, Tensor], None]
Way = Callable[[nn.Module, int], Step]


class TokenEncoder(nn.Module):
    """Embeds sequences of tokens: a transformer, and the mean of its outputs.

    Args:
        width: The width of the transformer.
        embedding: The size of an embedding.
        layers: The number of layers.
    """

    def __init__(self, width: int, embedding: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, embedding)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.transformer(self.tokens(ids)).mean(1))


def info_nce(queries: Tensor, passages: Tensor) -> Tensor:
    """Return the loss with in-batch negatives of sentence-transformers' MultipleNegativesRankingLoss."""
    scores = SCALE * nn.functional.normalize(queries, dim=-1) @ nn.functional.normalize(passages, dim=-1).T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def info_nce_in_parts(queries: Tensor, passages: Tensor, rows: int) -> Tensor:
    """Return the same loss, with the scores of so many queries at once."""
    queries, passages = nn.functional.normalize(queries, dim=-1), nn.functional.normalize(passages, dim=-1)

    def part(queries: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(SCALE * queries @ passages.T, labels, reduction="sum")

    labels = torch.arange(len(queries), device=queries.device)
    parts = zip(queries.split(rows), labels.split(rows), strict=True)
    return sum(checkpoint(part, *each, use_reentrant=False) for each in parts) / len(queries)


def batched(encoder: nn.Module, chunk: int) -> Step:
    """Keep the graph of the whole batch."""
    del chunk

    def step(queries: Tensor, passages: Tensor) -> None:
        info_nce(encoder(queries), encoder(passages)).backward()

    return step


def checkpoints(encoder: nn.Module, chunk: int) -> Step:
    """Wrap each chunk in `torch.utils.checkpoint`."""

    def embed(inputs: Tensor) -> Tensor:
        return torch.cat([checkpoint(encoder, part, use_reentrant=False) for part in inputs.split(chunk)])

    def step(queries: Tensor, passages: Tensor) -> None:
        info_nce(embed(queries), embed(passages)).backward()

    return step


def two_passes(encoder: nn.Module, chunk: int) -> Step:
    """Write GradCache's two passes plainly, without random states (Gao et al., 2021, arXiv:2101.06983, section 3)."""

    def embed(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([encoder(part) for part in inputs.split(chunk)]).requires_grad_()

    def step(queries: Tensor, passages: Tensor) -> None:
        cached = embed(queries), embed(passages)
        info_nce(*cached).backward()
        for inputs, embeddings in zip((queries, passages), cached, strict=True):
            for part, gradient in zip(inputs.split(chunk), embeddings.grad.split(chunk), strict=True):
                torch.autograd.backward(encoder(part), gradient)

    return step


def grad_cache(encoder: nn.Module, chunk: int) -> Step:
    """Use GradCache (pip install git+https://github.com/luyug/GradCache)."""
    from grad_cache import GradCache  # noqa: PLC0415 - optional

    cache = GradCache(models=[encoder, encoder], chunk_sizes=chunk, loss_fn=info_nce)

    def step(queries: Tensor, passages: Tensor) -> None:
        cache(queries, passages)

    return step


def cached_ranking_loss(encoder: nn.Module, chunk: int) -> Step:
    """Use CachedMultipleNegativesRankingLoss of sentence-transformers."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - optional
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss  # noqa: PLC0415 - optional

    class WithFeatures(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": encoder(features["input_ids"])}

    model = SentenceTransformer(modules=[WithFeatures()])
    loss = CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=chunk)

    def step(queries: Tensor, passages: Tensor) -> None:
        loss([{"input_ids": queries}, {"input_ids": passages}], torch.empty(0)).backward()

    return step


def multi_pose(encoder: nn.Module, chunk: int) -> Step:
    """Wrap the encoder, in chunks of the same size, with the least memory; both sides are one batch."""
    scorer = MultiPose(encoder, None, memory=0, chunk_size=chunk)

    def step(queries: Tensor, passages: Tensor) -> None:
        info_nce(*scorer(torch.cat([queries, passages])).per_pose.chunk(2)).backward()

    return step


def multi_pose_in_parts(encoder: nn.Module, chunk: int) -> Step:
    """Wrap the encoder likewise, and compute the loss in parts of the size of a chunk."""
    scorer = MultiPose(encoder, None, memory=0, chunk_size=chunk)

    def step(queries: Tensor, passages: Tensor) -> None:
        info_nce_in_parts(*scorer(torch.cat([queries, passages])).per_pose.chunk(2), rows=chunk).backward()

    return step


def multi_pose_default(encoder: nn.Module, chunk: int) -> Step:
    """Wrap the encoder, with the default memory."""
    del chunk
    scorer = MultiPose(encoder, None)

    def step(queries: Tensor, passages: Tensor) -> None:
        info_nce(*scorer(torch.cat([queries, passages])).per_pose.chunk(2)).backward()

    return step


PEERS: dict[str, tuple[str, Way]] = {
    "GradCache": ("grad_cache", grad_cache),
    "CachedMultipleNegativesRankingLoss": ("sentence_transformers", cached_ranking_loss),
}


def ways() -> dict[str, Way]:
    """Return the ways by name, with those peers that are installed."""
    return {
        "full graph, batched": batched,
        "checkpoint per chunk": checkpoints,
        "two passes": two_passes,
        **{name: way for name, (package, way) in PEERS.items() if find_spec(package)},
        "MultiPose, memory=0": multi_pose,
        "MultiPose, memory=0, loss in parts": multi_pose_in_parts,
        "MultiPose": multi_pose_default,
    }


def lines_of(way: Way) -> int:
    """Return how many lines a user writes: those of the body without its docstring and the definition of `step`."""
    source = inspect.getsource(way)
    (docstring, *_) = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)).body
    lines = [line.strip() for line in source.splitlines()[docstring.end_lineno :]]
    return sum(not line.startswith(("def step", "return step", "del ")) for line in lines if line)

"""Train a cross-encoder on ranked lists of unequal length, in the Trainer of Hugging Face transformers.

    python examples/ranked_lists.py                      # half a minute on one core
    python examples/ranked_lists.py --loss lambdarank --memory 0

A list is a group: one query with some documents, each with a relevance. All documents of a batch of lists are one call
of `MultiPose` with `combination=None`, which leaves the scores as they are, and the loss compares the scores of each
list. The encoder is tiny and its weights are random; the lists are made up; nothing is downloaded.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import gradhooks
from gradhooks.group_reductions import expand_groups, group_logsumexp, group_softmax, group_sum

SEPARATOR, TOPICS, WORDS = 1, 4, 16  # token 0 is padding, 2 .. 5 are topics, the rest are other words
FIRST_WORD = 2 + TOPICS
MOST_RELEVANT = 2


class RankedList(NamedTuple):
    """A query with its documents.

    Attributes:
        documents: The tokens of query and document, shape `(length,)` each.
        relevance: The relevance of each document, shape `(N,)`.
    """

    documents: list[Tensor]
    relevance: Tensor


Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Of scores and relevance, shape `(M,)`, the list of each document, shape `(M,)`, and the number of lists."""


def listnet(scores: Tensor, relevance: Tensor, lists: Tensor, count: int) -> Tensor:
    """Compute the cross entropy of the softmax over each list (Cao et al., ICML 2007)."""
    log_probabilities = scores - expand_groups(group_logsumexp(scores, lists, count), lists)
    target = group_softmax(relevance, lists, count)
    return -group_sum(target * log_probabilities, lists, count).mean()


def pairwise(scores: Tensor, relevance: Tensor, lists: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Compute the logistic loss of pairs of a list (Burges et al., ICML 2005), with weights of shape `(M, M)`."""
    is_pair = (lists[:, None] == lists) & (relevance[:, None] > relevance)
    better, worse = is_pair.nonzero(as_tuple=True)
    losses = softplus(scores[worse] - scores[better])
    return (losses if weights is None else losses * weights[better, worse]).sum() / count


def lambdarank(scores: Tensor, relevance: Tensor, lists: Tensor, count: int) -> Tensor:
    """Compute the pairwise loss, a pair weighted by what its exchange changes in NDCG (Burges et al., NIPS 2006)."""
    gains, discounts = gains_and_discounts(scores.detach(), relevance, lists)
    _, ideal = gains_and_discounts(relevance, relevance, lists)
    shares = gains / expand_groups(group_sum(gains * ideal, lists, count).clamp_min(1e-9), lists)
    weights = (shares[:, None] - shares).abs() * (discounts[:, None] - discounts).abs()
    return pairwise(scores, relevance, lists, count, weights)


def gains_and_discounts(scores: Tensor, relevance: Tensor, lists: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gain of each document, and the discount of its rank in the list when sorted by score."""
    places = torch.arange(len(scores), device=scores.device)
    is_ahead = (scores > scores[:, None]) | ((scores == scores[:, None]) & (places < places[:, None]))
    ranks = ((lists == lists[:, None]) & is_ahead).sum(1)
    return 2**relevance - 1, 1 / torch.log2(ranks + 2)


LOSSES: dict[str, Loss] = {"listnet": listnet, "pairwise": pairwise, "lambdarank": lambdarank}


class Reranker(nn.Module):
    """The module that the Trainer trains; it does not depend on how `scorer` computes gradients."""

    def __init__(self, scorer: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.scorer, self.loss = scorer, loss

    def forward(self, lists: gradhooks.Groups, relevance: Tensor) -> dict[str, Tensor]:
        """Return the loss, and the score of each document."""
        scores: Tensor = self.scorer(lists).per_pose
        index, count = lists.index.to(scores.device), int(lists.count or 1)
        return {"loss": self.loss(scores, relevance.to(scores), index, count), "scores": scores}


def cross_encoder() -> BertForSequenceClassification:
    """Return a tiny encoder with random weights that gives one score to a query and a document."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vocabulary = {"vocab_size": FIRST_WORD + WORDS, "max_position_embeddings": 32, "num_labels": 1}
    return BertForSequenceClassification(BertConfig(**sizes, **no_dropout, **vocabulary))


def score(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the scores of a batch of documents, shape `(n,)`."""
    logits: Tensor = model(**batch).logits
    return logits.squeeze(-1)


def pad(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pad the documents of a chunk to the longest of them."""
    tokens = pad_sequence(list(documents), batch_first=True)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


def scorer_of(model: nn.Module, **options: Any) -> gradhooks.MultiPose:
    """Return a scorer of documents."""
    return gradhooks.MultiPose(model, None, call=score, collate=pad, **options)


def keyword_arguments(lists: Sequence[RankedList]) -> dict[str, Any]:
    """Return the keyword arguments of the forward, for lists of any length."""
    groups = gradhooks.collate_groups([ranked.documents for ranked in lists])
    return {"lists": groups, "relevance": torch.cat([ranked.relevance for ranked in lists])}


def make_lists(count: int, generator: torch.Generator) -> list[RankedList]:
    """Make lists of 2 to 9 documents; relevant is a document in which the topic of the query occurs."""

    def draw(low: int, high: int, size: int = 1) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    lists = []
    for _ in range(count):
        query, documents, relevance = draw(2, FIRST_WORD), [], []
        for _ in range(int(draw(2, 10))):
            words = draw(2, FIRST_WORD + WORDS, int(draw(3, 12)))
            occurrences = int(draw(0, MOST_RELEVANT + 1))
            words[words == query] = SEPARATOR
            words[:occurrences] = query
            words = words[torch.randperm(len(words), generator=generator)]
            documents.append(torch.cat([query, torch.tensor([SEPARATOR]), words]))
            relevance.append(float(occurrences))
        lists.append(RankedList(documents, torch.tensor(relevance)))
    return lists


@torch.no_grad()
def ndcg(scorer: nn.Module, lists: Sequence[RankedList]) -> float:
    """Return the mean normalized discounted cumulative gain; lists without a relevant document do not count."""
    batch = keyword_arguments(lists)
    index, count, relevance = batch["lists"].index, len(lists), batch["relevance"]
    gains, discounts = gains_and_discounts(scorer(batch["lists"]).per_pose, relevance, index)
    _, ideal = gains_and_discounts(relevance, relevance, index)
    reached, possible = (group_sum(gains * each, index, count) for each in (discounts, ideal))
    return float((reached / possible)[possible > 0].mean())


def train(scorer: nn.Module, loss: Loss, lists: Sequence[RankedList], folder: str, **options: Any) -> None:
    """Train; `options` go to `TrainingArguments`."""
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        remove_unused_columns=False,  # a list has no named columns
        report_to="none",
        **options,
    )
    Trainer(Reranker(scorer, loss), arguments, keyword_arguments, train_dataset=lists).train()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Ranked lists with transformers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES), help="of the scores of a list")
    parser.add_argument("--lists", type=int, default=300, help="number of training lists and of held-out lists")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training lists")
    parser.add_argument("--memory", default="1GiB", help="of a step beyond that of one document: bytes, 64MiB, ...")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train with each loss, and print NDCG on held-out lists before and after."""
    options = parse_arguments(argv)
    generator = torch.Generator().manual_seed(0)
    training, held_out = (make_lists(options.lists, generator) for _ in range(2))
    rows = []
    for name in options.loss:
        torch.manual_seed(0)
        scorer = scorer_of(cross_encoder(), memory=options.memory)
        before = ndcg(scorer, held_out)
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
            train(scorer, LOSSES[name], training, folder, num_train_epochs=options.epochs, use_cpu=True, **quiet)
        rows.append([name, before, ndcg(scorer, held_out)])
    print(tabulate(rows, ["loss", "NDCG before", "NDCG after"], tablefmt="pipe", floatfmt=".3f"))


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for a network this small
    main()

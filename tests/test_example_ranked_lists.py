"""Runs examples/ranked_lists.py on few lists; gradients and weights are those of one document after the other."""

import copy
import importlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import OF_TRAINERS, STEPS, fast_garbage_collection, missing
from training_reference import ACCUMULATORS_AND_PLAIN, case_label, options_of

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = OF_TRAINERS


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason=missing(package))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with torch.random.fork_rng():
        yield importlib.import_module("ranked_lists")


class OneByOne(nn.Module):
    """Scores one document after the other, unpadded, in one graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, groups: Any) -> Any:
        scores = [self.model(input_ids=document[None]).logits[0, 0] for document in groups.poses]
        return SimpleNamespace(per_pose=torch.stack(scores))


def ragged_lists(example: ModuleType, count: int) -> list[Any]:
    lists: list[Any] = example.make_lists(count, torch.Generator().manual_seed(1))
    assert len({len(ranked.documents) for ranked in lists}) > 2
    return lists


def test_gradients_are_those_of_one_document_after_the_other(example: ModuleType) -> None:
    torch.manual_seed(0)
    model, batch = example.cross_encoder().double(), example.keyword_arguments(ragged_lists(example, 4))
    order = torch.randperm(len(batch["lists"]))  # documents of all lists, mixed
    groups = batch["lists"]
    groups.poses, groups.index = [groups.poses[place] for place in order], groups.index[order]
    batch["relevance"] = batch["relevance"][order]
    for name, loss in example.LOSSES.items():
        results = []
        for mode in (None, *(ACCUMULATORS_AND_PLAIN if name == "listnet" else ["auto"])):
            scorer = OneByOne(model) if mode is None else example.scorer_of(model, **options_of(mode))
            model.zero_grad()
            output = example.Reranker(scorer, loss)(**batch)
            output["loss"].backward()
            found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
            results.append([output["loss"].detach(), output["scores"].detach(), *found])
            with case_label(name, mode):
                for actual, expected in zip(results[-1], results[0], strict=True):
                    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_the_trainer_gives_the_weights_of_one_document_after_the_other(example: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, lists = example.cross_encoder().double(), ragged_lists(example, 16)
    trained = []
    for make in (OneByOne, lambda own: example.scorer_of(own, memory=0)):
        own = copy.deepcopy(model)
        torch.manual_seed(0)
        options = {"max_steps": STEPS, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        with fast_garbage_collection():
            example.train(make(own), example.listnet, lists, str(tmp_path), **options)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in own.parameters()]))
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert (trained[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-9, atol=1e-9)


def test_losses_are_those_of_each_list(example: ModuleType) -> None:
    relevance = torch.tensor([2.0, 0, 1, 0, 0, 1, 2, 1], dtype=torch.float64)
    scores, lists = torch.randn(8, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 1, 0, 2])

    def dcg(order: Tensor, grades: Tensor) -> float:
        return sum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(grades[order].tolist()))

    listnet, pairwise, lambdarank = [], [], []
    for group in range(3):
        own, grades = scores[lists == group], relevance[lists == group]
        listnet.append(nn.functional.cross_entropy(own, grades.softmax(0)))
        best, order = dcg(grades.argsort(descending=True), grades), own.argsort(descending=True)
        for better, worse in itertools.permutations(range(len(own)), 2):
            if grades[better] <= grades[worse]:
                continue
            exchanged = order.clone()
            exchanged[(order == better) | (order == worse)] = order[(order == better) | (order == worse)].flip(0)
            pairwise.append(nn.functional.softplus(own[worse] - own[better]))
            lambdarank.append(pairwise[-1] * abs(dcg(order, grades) - dcg(exchanged, grades)) / best)
    for loss, parts in ((example.listnet, listnet), (example.pairwise, pairwise), (example.lambdarank, lambdarank)):
        torch.testing.assert_close(loss(scores, relevance, lists, 3), torch.stack(parts).sum() / 3)


def test_the_printed_ndcg_rises(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with fast_garbage_collection():
        example.main(["--loss", "listnet", "--lists", "40", "--epochs", "4"])
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert float(row[3]) > float(row[2]) + 0.02

"""Runs the examples of trainers on little data; the weights are those of the full graph in the same trainer."""

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import OF_TRAINERS, STEPS, FullGraph, accelerator_of, fast_garbage_collection, missing

import gradhooks
from gradhooks.testing import full_graph

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGES = {
    "with_lightning": ("lightning", "rdkit", "torch_geometric", "matplotlib", "tqdm"),
    "with_transformers": ("transformers", "accelerate", "sklearn", "matplotlib", "tqdm", "gradhooks_mil"),
    "with_accelerate": ("accelerate", "sklearn", "matplotlib", "tqdm", "gradhooks_mil"),
}
TINY = {
    "with_lightning": ["--molecules=8", "--epochs=6"],
    "with_transformers": ["--bags=12", "--epochs=2"],
    "with_accelerate": ["--bags=12", "--epochs=2"],
}

pytestmark = [
    *OF_TRAINERS,
    # Importing torch_geometric calls torch.jit.script.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def imported(name: str) -> ModuleType:
        for package in PACKAGES[name]:
            pytest.importorskip(package, reason=missing(package))
        return importlib.import_module(name)

    with torch.random.fork_rng():
        yield imported


@pytest.mark.parametrize("name", PACKAGES)
def test_the_printed_loss_falls(
    name: str, load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache", str(tmp_path)] if name == "with_lightning" else []
    with fast_garbage_collection():
        load(name).main([*TINY[name], *cache])
    headers, _, first, last = capsys.readouterr().out.splitlines()[-4:]
    assert "held" in headers
    losses = [float(row.split("|")[2]) for row in (first, last)]
    assert losses[1] < losses[0]


def assert_same_weights(actual: nn.Module, expected: nn.Module, before: nn.Module) -> None:
    for parameter, reference, old in zip(actual.parameters(), expected.parameters(), before.parameters(), strict=True):
        assert not torch.equal(reference, old)
        torch.testing.assert_close(parameter, reference, rtol=1e-12, atol=1e-12)


def in_float64(bags: list[Any]) -> list[Any]:
    return [bag._replace(images=bag.images.double(), label=bag.label.double()) for bag in bags]


class FullGraphOfGroups(FullGraph):
    """Takes `Groups`, as the examples pass them."""

    def forward(self, groups: gradhooks.Groups) -> Any:
        return full_graph(self.model, groups.poses, self.combination, groups.index, **self.options)


def call_with_one_image(model: nn.Module, image: Tensor) -> Tensor:
    prediction: Tensor = model(image.unsqueeze(0)).squeeze(0)
    return prediction


def call_with_one_molecule(model: nn.Module, pose: tuple[Tensor, Tensor]) -> Tensor:
    prediction: Tensor = model(*pose).squeeze(0)
    return prediction


def assert_trains_as_full_graph(
    model: nn.Module,
    combination: nn.Module,
    train: Callable[[nn.Module], Any],
    call: Callable[..., Tensor],
    **options: Any,
) -> None:
    """Train with the example's function by the full graph, whose poses run by `call`, and by gradhooks, and compare."""
    reference = FullGraphOfGroups(copy.deepcopy(model), copy.deepcopy(combination), call=call)
    trained = gradhooks.MultiPose(copy.deepcopy(model), combination, **options)
    for scorer in (reference, trained):
        torch.manual_seed(0)
        with fast_garbage_collection():
            train(scorer)
    assert_same_weights(trained.model, reference.model, model)


every_memory = pytest.mark.parametrize("memory", ["1GiB", 0])


@every_memory
def test_lightning_trains_as_the_full_graph(load: Callable[[str], ModuleType], tmp_path: Path, memory: Any) -> None:
    example = load("with_lightning")
    halves = example.split(example.sulfonamides(), 8, seed=0)
    training, held_out = (list(example.load_ligands(half, 2, 0, tmp_path, torch.device("cpu"))) for half in halves)
    options = {"max_steps": STEPS, "accelerator": "cpu", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    options = {**options, "precision": "64-true", "default_root_dir": tmp_path, "enable_progress_bar": False}
    assert_trains_as_full_graph(
        example.model_for(training).double(),
        gradhooks.combinations.Boltzmann(),
        lambda scorer: example.train(scorer, training, held_out, **options),
        call_with_one_molecule,
        memory=memory,
        collate=example.collate_molecules,
    )


@every_memory
def test_transformers_trains_as_the_full_graph(load: Callable[[str], ModuleType], tmp_path: Path, memory: Any) -> None:
    example = load("with_transformers")
    training, held_out = map(
        in_float64, example.load_bags(example.data_options(["--bags=8", "--held-out=2", "--size=4"]))
    )
    options = {"max_steps": STEPS, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    assert_trains_as_full_graph(
        example.network(1).double(),
        gradhooks.registry.combinations.resolve("noisy_or"),
        lambda scorer: example.train(scorer, training, held_out, str(tmp_path), **options),
        call_with_one_image,
        memory=memory,
    )


@every_memory
def test_accelerate_trains_as_the_full_graph(load: Callable[[str], ModuleType], memory: Any) -> None:
    example = load("with_accelerate")
    training, held_out = map(
        in_float64, example.load_bags(example.data_options(["--bags=10", "--held-out=2", "--size=4"]))
    )
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    assert_trains_as_full_graph(
        example.network(example.EMBEDDING).double(),
        example.AttentionClassifier(example.EMBEDDING).double(),
        lambda scorer: example.train(scorer, training, held_out, 1, accelerator),
        call_with_one_image,
        memory=memory,
    )

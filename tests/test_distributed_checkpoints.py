"""Checkpoints by torch.distributed.checkpoint: of models and optimizers, full and sharded, bare to wrapped and back."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_helpers import learnable_boltzmann
from multiprocess import run_on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from gradhooks import MultiPose
from gradhooks.combinations import Boltzmann

pytestmark = [  # of torch 2.6 itself
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable or uninitialized"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

PAIRS = [
    ("bare", "fixed"),
    ("fixed", "bare"),
    ("fixed", "fixed"),
    ("learnable", "learnable"),
    ("bare", "learnable"),
    ("learnable", "bare"),
]


def new_model(seed: int) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, eps=0.1), nn.Tanh(), nn.Linear(6, 1)).double()


class Setup:
    """A model, bare or wrapped, with an optimizer that has made some steps."""

    def __init__(self, kind: str, seed: int, *, shard: bool = False, steps: int = 0) -> None:
        self.model = new_model(seed).eval()
        if shard:
            from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not imported by processes without shards

            for part in (self.model[0], self.model):
                fully_shard(part)
        combination = learnable_boltzmann(0.5).double() if kind == "learnable" else Boltzmann(0.5)
        self.scorer = MultiPose(self.model, combination)
        self.module: nn.Module = self.model if kind == "bare" else self.scorer
        # The order differs from that of the names.
        self.optimizer = torch.optim.AdamW(list(self.module.parameters())[::-1], lr=0.01 * (1 + seed))
        for _ in range(steps):
            self.step()

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.scorer(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)).combined.square().sum()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def values(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint contains of the model, by the names of the bare model."""
        values: dict[str, Tensor] = {}
        for name, parameter in [*self.model.named_parameters(), *self.model.named_buffers()]:
            values[name] = _full(parameter)
            values |= {f"{name}: {key}": _full(each) for key, each in self.optimizer.state.get(parameter, {}).items()}
        return values


def _full(value: Any) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def round_trip(source: Setup, target: Setup, options: StateDictOptions, folder: Path | None) -> None:
    """Save a setup, and load it into another one."""
    model_state, optimizer_state = get_state_dict(source.module, source.optimizer, options=options)
    if folder is not None:
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
        model_state, optimizer_state = get_state_dict(target.module, target.optimizer, options=options)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
        model_state, optimizer_state = state["model"], state["optimizer"]
    set_state_dict(
        target.module,
        target.optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=options,
    )


def exchange_all(pairs: list[tuple[str, str]], folder: str, *, shard: bool) -> list[str]:
    """Exchange checkpoints of all kinds; return the cases in which something differs."""
    wrong = []
    for (one, other), (full, save) in itertools.product(pairs, [(True, False), (False, False), (False, True)]):
        strict = "learnable" not in {one, other} or one == other
        if not strict and torch.__version__ < "2.7":  # which asks for the optimizer's state of every parameter
            continue
        source, target = Setup(one, 0, shard=shard, steps=2), Setup(other, 1, shard=shard)
        options = StateDictOptions(full_state_dict=full, strict=strict)
        case = f"{one} to {other}, full={full}, saved={save}"
        round_trip(source, target, options, Path(folder) / case if save else None)
        expected, found = source.values(), target.values()
        if expected.keys() != found.keys() or any(not torch.equal(expected[name], found[name]) for name in expected):
            wrong.append(case)
        target.scorer.learned = source.scorer.learned
        if one == other and source.step() != target.step():
            wrong.append(f"{case}: the next step")
    return wrong


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_are_exchanged_without_shards(tmp_path: Path) -> None:
    assert exchange_all(PAIRS, str(tmp_path), shard=False) == []


def exchange_shards(_: int, folder: str) -> list[str]:
    return exchange_all([("bare", "fixed"), ("fixed", "bare"), ("learnable", "learnable")], folder, shard=True)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 runs on a CPU from torch 2.7 on")
def test_checkpoints_are_exchanged_with_shards(tmp_path: Path) -> None:
    assert run_on_ranks(exchange_shards, str(tmp_path), timeout=120) == [[], []]


@pytest.mark.parametrize("flatten", [False, True])
def test_the_keys_of_an_optimizer_are_those_of_the_bare_model(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    bare, wrapped = Setup("bare", 0, steps=1), Setup("fixed", 0, steps=1)
    expected, state = (
        get_optimizer_state_dict(each.module, each.optimizer, options=options) for each in (bare, wrapped)
    )
    assert state.keys() == expected.keys()
    if not flatten:
        assert list(state["state"]) == list(expected["state"])
        assert [group["params"] for group in state["param_groups"]] == [
            group["params"] for group in expected["param_groups"]
        ]
    other = Setup("fixed", 1)
    set_optimizer_state_dict(other.module, other.optimizer, state, options=options)
    assert other.optimizer.param_groups[0]["lr"] == 0.01


class Outer(nn.Module):
    """A larger model that contains a scorer, and has a child with the name of a child of the scorer."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer
        self.model = nn.Linear(1, 1).double()


def test_a_scorer_inside_a_larger_model() -> None:
    setup = Setup("learnable", 0, steps=1)
    outer = Outer(setup.scorer)
    optimizer = torch.optim.SGD(outer.parameters(), 0.1, momentum=0.9)
    model_state, state = get_state_dict(outer, optimizer)
    names = [f"scorer.{name}" for name, _ in setup.model.named_parameters()]
    assert set(state["param_groups"][0]["params"]) == {
        *names,
        "scorer.combination.log_temperature",
        "model.weight",
        "model.bias",
    }
    set_state_dict(outer, optimizer, model_state_dict=model_state, optim_state_dict=state)


def in_data_parallel(_: int) -> list[str]:
    setup = Setup("fixed", 0)
    wrapped = DistributedDataParallel(setup.scorer)
    model_state, state = get_state_dict(wrapped, setup.optimizer)
    set_state_dict(wrapped, setup.optimizer, model_state_dict=model_state, optim_state_dict=state)
    assert dist.get_world_size() == 2
    return sorted(state["param_groups"][0]["params"])


def test_a_scorer_in_data_parallel() -> None:
    names = sorted(name for name, _ in new_model(0).named_parameters())
    assert run_on_ranks(in_data_parallel) == [names, names]

"""DistributedDataParallel around a MultiPose computes the gradients of the full graph."""

from itertools import cycle, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from data_parallel import ACCUMULATORS, SCENARIOS, Parameters, TrainingRun, deviation, new_module, train
from multiprocess import run_on_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from training_reference import assert_bit_equal, relative_errors

import gradhooks

DDP_MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "bucket view": {"gradient_as_bucket_view": True},
}
MORE_DDP_MODES: dict[str, dict[str, Any]] = {
    "small buckets": {"bucket_cap_mb": 1e-4},
    "all options": {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4},
    "static graph and bucket view": {"static_graph": True, "gradient_as_bucket_view": True},
}
OWN_BUFFERS: dict[str, dict[str, Any]] = {"own buffers": {"broadcast_buffers": False}}
TOLERANCE = 1e-12

# Without find_unused_parameters, a parameter that no rank used gets zeros from DDP, which raises for the full graph.
NEEDS_FIND_UNUSED = {"other parameters each time"}
# Each forward takes the buffers of rank 0, or each rank has its own, so a single process is no reference for them.
NEEDS_WRAPPED_REFERENCE = {"buffers", "buffers of several forwards", "statistics"}
# With four ranks each has another accumulator, and most ranks do not use a parameter that one uses.
ON_FOUR_RANKS = ["one group", "several forwards", "other parameters", "other parameters each time", "statistics"]

# The others, and every mode with every accumulator, have the marker "long".
IN_SHORT = {"one group", "several forwards", "other parameters", "statistics"}


def ddp_modes(name: str, world_size: int) -> dict[str, dict[str, Any]]:
    if world_size == 4:
        modes = DDP_MODES
    else:
        modes = DDP_MODES | MORE_DDP_MODES | (OWN_BUFFERS if name in NEEDS_WRAPPED_REFERENCE else {})
    if name in NEEDS_FIND_UNUSED:
        modes = {mode: options for mode, options in modes.items() if "find_unused_parameters" in options}
    return modes


def accumulators_of(rank: int, world_size: int) -> dict[str, str]:
    """Return the accumulators to train this rank with: each one on all ranks, and another one on each rank."""
    names = list(ACCUMULATORS)
    if world_size == 4:
        return {"mixed": names[rank]}
    return {name: name for name in names} | {"store, stream": names[rank], "recompute, auto": names[2 + rank]}


def cells(name: str, rank: int, world_size: int, *, every: bool) -> dict[str, dict[str, str]]:
    """Return the accumulators to train this rank with, by DDP mode: all of them, or the next one for each mode."""
    accumulators = accumulators_of(rank, world_size)
    modes = ddp_modes(name, world_size)
    if every:
        return dict.fromkeys(modes, accumulators)
    turns = cycle(accumulators.items())
    return {mode: dict([next(turns)]) for mode in modes}


def train_in_all_modes(
    rank: int, world_size: int, name: str, every: bool
) -> dict[tuple[str, str], tuple[float, Parameters]]:
    """Return the deviation from the full graph and the final parameters, by DDP mode and accumulator."""
    scenario, wrapped = SCENARIOS[name], name in NEEDS_WRAPPED_REFERENCE
    single_process: dict[bool, TrainingRun] = {}
    results = {}
    accumulators = cells(name, rank, world_size, every=every)
    for mode, options in ddp_modes(name, world_size).items():
        if wrapped:
            expected = train(scenario, None, [rank], options)
        else:
            # Of the options of DDP, a single process depends on the number of backwards at a step only.
            static = "static_graph" in options
            if static not in single_process:
                single_process[static] = train(scenario, None, list(range(world_size)), options, wrapped=False)
            expected = single_process[static]
        for label, accumulator in accumulators[mode].items():
            run = train(scenario, accumulator, [rank], options)
            results[mode, label] = deviation(run, expected), run.parameters
    return results


def check(name: str, world_size: int, *, every: bool) -> None:
    ranks = run_on_ranks(train_in_all_modes, world_size, name, every, world_size=world_size)
    expected = cells(name, 0, world_size, every=every)
    labels = [(mode, label) for mode, accumulators in expected.items() for label in accumulators]
    assert [list(results) for results in ranks] == [labels] * world_size
    errors = {(rank, *key): error for rank, results in enumerate(ranks) for key, (error, _) in results.items()}
    assert {key: error for key, error in errors.items() if not error <= TOLERANCE} == {}
    for key, (_, parameters) in ranks[0].items():
        for results in ranks[1:]:
            assert_bit_equal(dict(results[key][1]), dict(parameters))


@pytest.mark.parametrize(("name", "world_size"), [*((name, 2) for name in sorted(IN_SHORT)), ("one group", 4)])
def test_every_mode_of_data_parallel_training(name: str, world_size: int) -> None:
    check(name, world_size, every=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "world_size"), [*((name, 2) for name in SCENARIOS), *((name, 4) for name in ON_FOUR_RANKS)]
)
def test_every_mode_with_every_accumulator(name: str, world_size: int) -> None:
    check(name, world_size, every=True)


JOIN_SCENARIO = SCENARIOS["one group"]
GROUPS = [2, 4, 1, 3]  # number of groups of each rank


def train_until_joined(rank: int, world_size: int) -> dict[tuple[str, bool, str], float]:
    """Return the deviation from a single process by DDP mode, divisor of the average, and accumulator."""
    counts = GROUPS[:world_size]
    results = {}
    for by_world_size in (True, False):
        expected = parameters_without_joined_ranks(counts, by_world_size)
        accumulators = list(ACCUMULATORS)[by_world_size::2]
        for (mode, options), accumulator in product(DDP_MODES.items(), accumulators):
            module = DistributedDataParallel(new_module(JOIN_SCENARIO, accumulator), **options)
            with Join([module], divide_by_initial_world_size=by_world_size):
                for step in range(counts[rank]):
                    train_step(module, step, {rank: 1.0})
            actual = parameters_of(module.module)
            results[mode, by_world_size, accumulator] = max(relative_errors(dict(actual), dict(expected)).values())
    return results


def parameters_without_joined_ranks(counts: list[int], by_world_size: bool) -> Parameters:
    """Train in one process, at each step with the groups of the ranks that still have some."""
    module = new_module(JOIN_SCENARIO, None)
    for step in range(max(counts)):
        active = [rank for rank, count in enumerate(counts) if step < count]
        train_step(module, step, dict.fromkeys(active, 1 / (len(counts) if by_world_size else len(active))))
    return parameters_of(module)


def train_step(module: nn.Module, step: int, weights: dict[int, float]) -> None:
    for rank, weight in weights.items():
        (weight * JOIN_SCENARIO.loss_of(module, JOIN_SCENARIO.groups(rank, step, 0))).backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    module.zero_grad()


def parameters_of(module: nn.Module) -> Parameters:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_join_after_different_numbers_of_groups(world_size: int) -> None:
    for results in run_on_ranks(train_until_joined, world_size, world_size=world_size):
        assert len(results) == len(DDP_MODES) * len(ACCUMULATORS)
        assert {key: error for key, error in results.items() if not error <= TOLERANCE} == {}


class Scored(gradhooks.Combination):
    """Also returns predictions of the poses, with parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.instances, self.unused = nn.Linear(3, 1), nn.Linear(3, 2), nn.Linear(3, 1)

    def forward(self, predictions: Tensor) -> gradhooks.Combined:
        weights = self.score(predictions).softmax(0)
        return gradhooks.Combined((weights * predictions).sum(0), per_pose=(self.instances(predictions),))


@pytest.mark.parametrize("memory", [0, "1GiB"])
@pytest.mark.parametrize("uses_outputs", [False, True])
def test_outputs_of_a_combination_are_found_by_the_search_for_unused_parameters(
    memory: object, uses_outputs: bool
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for wrapped in (False, True):
            torch.manual_seed(0)
            scorer = gradhooks.MultiPose(nn.Linear(4, 3).double(), Scored().double(), memory=memory)
            module = DistributedDataParallel(scorer, find_unused_parameters=True) if wrapped else scorer
            for _ in range(2):
                scorer.zero_grad()
                prediction = module(torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4))
                loss = prediction.combined.square().sum()
                (loss + prediction.attention.square().sum() if uses_outputs else loss).backward()
            found.append([parameter.grad for parameter in scorer.parameters()])
        assert [grad is None for grad in found[1]] == [grad is None for grad in found[0]]
        assert sum(grad is None for grad in found[0]) == (2 if uses_outputs else 4)
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    finally:
        dist.destroy_process_group()

"""DistributedDataParallel around a MultiPose leaves what the full graph would have left."""

from typing import Any

import pytest
import torch
from data_parallel import ACCUMULATORS, SCENARIOS, Course, Weights, course_of, deviation, module_of
from multiprocess import on_ranks
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from training_reference import assert_bit_equal, distances

FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "bucket view": {"gradient_as_bucket_view": True},
}
SEVERAL: dict[str, dict[str, Any]] = {
    "small buckets": {"bucket_cap_mb": 1e-4},
    "all together": {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4},
    "static in views": {"static_graph": True, "gradient_as_bucket_view": True},
}
EXACT = 1e-12

# Without that flag DDP makes zeros of the gradient of a parameter that no rank used (and refuses the full graph).
NEEDS_FIND_UNUSED = {"other parameters each time"}
# One process knows no buffers that each forward takes from rank 0, and no rank's own ones.
NEEDS_WRAPPER = {"buffers", "buffers of several forwards", "statistics"}


def cases(names: set[str], **more: dict[str, Any]) -> list[Any]:
    modes = [(2, FLAGS), (4, FLAGS), (2, SEVERAL), (2, more)]
    return [
        pytest.param(name, options, world_size, id=f"{name}-{mode}-{world_size}")
        for name in SCENARIOS
        if name in names
        for world_size, some in modes
        for mode, options in some.items()
        if name not in NEEDS_FIND_UNUSED or "find_unused_parameters" in options
    ]


def courses(rank: int, world_size: int, name: str, mode: dict[str, Any], wrapped: bool) -> dict[str, Course]:
    """By the full graph, in one process or wrapped; by each accumulator; by another one on each rank."""
    scenario = SCENARIOS[name]
    reference = course_of(scenario, None, [rank] if wrapped else list(range(world_size)), mode, wrapped=wrapped)
    same = {name: name for name in ACCUMULATORS} if world_size == 2 else {}  # four processes take their time
    accumulators = {**same, "mixed": list(ACCUMULATORS)[rank % len(ACCUMULATORS)]}
    found = {label: course_of(scenario, name, [rank], mode) for label, name in accumulators.items()}
    return {"reference": reference, **found}


def check(name: str, mode: dict[str, Any], world_size: int, *, wrapped: bool) -> None:
    ranks = on_ranks(courses, world_size, name, mode, wrapped, world_size=world_size)
    errors = {
        (rank, accumulator): deviation(course, found["reference"])
        for rank, found in enumerate(ranks)
        for accumulator, course in found.items()
    }
    assert {place: error for place, error in errors.items() if not error <= EXACT} == {}
    for accumulator, course in ranks[0].items():
        for found in ranks[1:]:
            assert_bit_equal(found[accumulator].weights, course.weights)


@pytest.mark.parametrize(("name", "mode", "world_size"), cases(SCENARIOS.keys() - NEEDS_WRAPPER))
def test_every_mode_of_data_parallel_training(name: str, mode: dict[str, Any], world_size: int) -> None:
    check(name, mode, world_size, wrapped=False)


@pytest.mark.parametrize(
    ("name", "mode", "world_size"), cases(NEEDS_WRAPPER, **{"own buffers": {"broadcast_buffers": False}})
)
def test_buffers_go_the_way_of_the_wrapped_full_graph(name: str, mode: dict[str, Any], world_size: int) -> None:
    check(name, mode, world_size, wrapped=True)


JOINING = SCENARIOS["one group"]
GROUPS = [2, 4, 1, 3]  # of each rank, until it joins


def weights_after_joining(
    rank: int, world_size: int, mode: dict[str, Any], by_world_size: bool
) -> dict[str, tuple[Weights, Weights]]:
    """By each accumulator, and in one process."""
    counts = GROUPS[:world_size]
    theirs = without_those_who_joined(counts, by_world_size)
    found = {}
    for accumulator in ACCUMULATORS:
        module = DistributedDataParallel(module_of(JOINING, accumulator), **mode)
        with Join([module], divide_by_initial_world_size=by_world_size):
            for step in range(counts[rank]):
                step_with(module, step, {rank: 1.0})
        found[accumulator] = weights_of(module.module), theirs
    return found


def without_those_who_joined(counts: list[int], by_world_size: bool) -> Weights:
    """One process: at each step the groups of the ranks that still have some."""
    module = module_of(JOINING, None)
    for step in range(max(counts)):
        there = [rank for rank, count in enumerate(counts) if step < count]
        step_with(module, step, dict.fromkeys(there, 1 / (len(counts) if by_world_size else len(there))))
    return weights_of(module)


def step_with(module: nn.Module, step: int, shares: dict[int, float]) -> None:
    for rank, share in shares.items():
        (share * JOINING.loss_of(module, JOINING.groups(rank, step, 0))).backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    module.zero_grad()


def weights_of(module: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("by_world_size", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("mode", FLAGS)
def test_ranks_join_after_uneven_numbers_of_groups(mode: str, world_size: int, by_world_size: bool) -> None:
    for found in on_ranks(weights_after_joining, world_size, FLAGS[mode], by_world_size, world_size=world_size):
        for accumulator, (ours, theirs) in found.items():
            assert max(distances(dict(ours), dict(theirs)).values()) <= EXACT, accumulator

"""The harness of the distributed tests: ranks meet, a fault is told with its rank, and nothing hangs."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import RankError, on_ranks
from torch import Tensor


def meet(rank: int, values: list[float]) -> tuple[Tensor, int, int]:
    found = torch.tensor(values[rank])
    dist.all_reduce(found)
    return found, torch.get_num_threads(), os.getpid()


def raise_on_the_first(rank: int, message: str) -> float:
    if rank == 0:
        raise ValueError(message)
    return wait_for_all(rank)


def die_on_the_first(rank: int) -> float:
    if rank == 0:
        os._exit(3)
    return wait_for_all(rank)


def leave_the_second_alone(rank: int) -> float:
    return 0.0 if rank == 0 else wait_for_all(rank)


def sleep_on_the_first(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


def wait_for_all(rank: int) -> float:
    found = torch.tensor(float(rank))
    dist.all_reduce(found)
    return found.item()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_meet(world_size: int) -> None:
    results = on_ranks(meet, [1.0, 2.0, 3.0, 4.0], world_size=world_size)
    total = sum(range(1, world_size + 1))
    assert [(found.item(), threads) for found, threads, _ in results] == [(total, 1)] * world_size
    assert len({process for _, _, process in results}) == world_size


def test_processes_are_used_again_and_fresh_on_request() -> None:
    first, second, fresh = (
        [process for _, _, process in on_ranks(meet, [1.0, 2.0], fresh=new)] for new in (False, False, True)
    )
    assert first == second
    assert not set(second) & set(fresh)


def test_a_fault_is_told_with_its_rank_and_traceback() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)\Arank 0: ValueError: oh\n.*in raise_on_the_first"):
        on_ranks(raise_on_the_first, "oh")
    assert time.monotonic() - began < 20
    assert on_ranks(wait_for_all, world_size=2) == [1.0, 1.0]


def test_every_rank_s_fault_on_request() -> None:
    faults = on_ranks(raise_on_the_first, "oh", world_size=2, keep_faults=True)
    assert (faults[0].kind, faults[0].message) == ("ValueError", "oh")
    assert faults[1].kind in ("RuntimeError", "DistBackendError")  # the connection to rank 0 is closed


@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        (die_on_the_first, 60.0, "rank 0: ProcessDied: exit code 3"),
        (leave_the_second_alone, 4.0, "(?s)rank 1: .*in wait_for_all"),
        (sleep_on_the_first, 1.0, "rank 0: NoAnswer: had not answered after 1"),
    ],
)
def test_nothing_hangs(function: Any, timeout: float, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=message):
        on_ranks(function, timeout=timeout)
    assert time.monotonic() - began < 30

"""The harness of the distributed tests: ranks communicate, faults name their rank, every call ends."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import RankError, run_on_ranks
from torch import Tensor


def sum_over_ranks(rank: int, values: list[float]) -> tuple[Tensor, int, int]:
    tensor = torch.tensor(values[rank])
    dist.all_reduce(tensor)
    return tensor, torch.get_num_threads(), os.getpid()


def wait_for_all(rank: int) -> float:
    tensor = torch.tensor(float(rank))
    dist.all_reduce(tensor)
    return tensor.item()


def raise_on_rank_0(rank: int, message: str) -> float:
    if rank == 0:
        raise ValueError(message)
    return wait_for_all(rank)


def die_on_rank_0(rank: int) -> float:
    if rank == 0:
        os._exit(3)
    return wait_for_all(rank)


def return_early_on_rank_0(rank: int) -> float:
    return 0.0 if rank == 0 else wait_for_all(rank)


def sleep_on_rank_0(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_communicate(world_size: int) -> None:
    results = run_on_ranks(sum_over_ranks, [1.0, 2.0, 3.0, 4.0], world_size=world_size)
    total = sum(range(1, world_size + 1))
    assert [(tensor.item(), threads) for tensor, threads, _ in results] == [(total, 1)] * world_size
    assert len({process for _, _, process in results}) == world_size


def test_processes_are_reused_unless_fresh_ones_are_requested() -> None:
    first, second, new = (
        [process for _, _, process in run_on_ranks(sum_over_ranks, [1.0, 2.0], fresh=fresh)]
        for fresh in (False, False, True)
    )
    assert first == second
    assert not set(second) & set(new)


def test_error_shows_rank_and_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)\Arank 0: ValueError: oh\n.*in raise_on_rank_0"):
        run_on_ranks(raise_on_rank_0, "oh")
    assert time.monotonic() - start < 20
    assert run_on_ranks(wait_for_all, world_size=2) == [1.0, 1.0]


def test_faults_of_all_ranks_are_returned_on_request() -> None:
    faults = run_on_ranks(raise_on_rank_0, "oh", world_size=2, keep_faults=True)
    assert (faults[0].kind, faults[0].message) == ("ValueError", "oh")
    assert faults[1].kind in ("RuntimeError", "DistBackendError")  # the connection to rank 0 is closed


@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        (die_on_rank_0, 60.0, "rank 0: ProcessDied: exit code 3"),
        (return_early_on_rank_0, 4.0, "(?s)rank 1: .*in wait_for_all"),
        (sleep_on_rank_0, 1.0, "rank 0: NoAnswer: had not answered after 1"),
    ],
)
def test_every_call_ends(function: Any, timeout: float, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_on_ranks(function, timeout=timeout)
    assert time.monotonic() - start < 30

"""Trains on poses that are loaded while they run, in a process of its own, and prints how much its memory grew."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import gradhooks

NUMBERS = 2**14  # float32 numbers of a pose
POSE_BYTES = 4 * NUMBERS


class Patches(Dataset[Tensor]):
    """Makes each pose when it is asked for it."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((NUMBERS,), index / self.count)


def own_memory() -> int:
    """Return the bytes of this process that it shares with no other; the buffers of workers are shared."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def growth(count: int, workers: int) -> int:
    """Return by how many bytes the memory grows at most while `count` poses run twice."""
    model = nn.Sequential(nn.Linear(NUMBERS, 2), nn.Tanh(), nn.Linear(2, 1))
    before = largest = 0

    def watch(done: int, total: int) -> None:
        nonlocal largest
        del done, total
        largest = max(largest, own_memory())

    options: Any = {"memory": 0, "chunk_size": 16, "collate": torch.stack, "accumulator": "recompute"}
    scorer = gradhooks.MultiPose(model, "mean", progress=watch, **options)
    for size in (64, count):  # the first batch loads libraries
        before = largest = own_memory()
        poses: Any = DataLoader(Patches(size), batch_size=None, num_workers=workers) if workers else Patches(size)
        scorer(poses).combined.sum().backward()
        assert scorer.report.recomputed == size
    return largest - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    for workers in (2, 0):
        sys.stdout.write(f"{growth(int(sys.argv[1]), workers) / POSE_BYTES}\n")

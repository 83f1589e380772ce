"""Train in several ways under torchrun, from a checkpoint if there is one; `test_resuming.py` starts this program.

    torchrun --standalone --nproc-per-node 2 tests/resumed_training.py FOLDER [--kill]

With `--kill` every run ends after the checkpoint of step 4; in the last one rank 1 is killed in the forward of step 5.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import gradhooks

MODES = ("one process", "data parallel", "sharded", "pose parallel")
SAVED, STEPS = 4, 10


class Killed(nn.Module):
    """A layer that passes its input on, and kills its process in a forward when it is told to."""

    kills = False

    def forward(self, hidden: Tensor) -> Tensor:
        if self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return hidden


class Run:
    """One way of training."""

    def __init__(self, mode: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), Killed(), nn.Linear(16, 1))
        if mode == "sharded":
            from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - imported where it is used

            for part in (self.model[0], self.model):
                fully_shard(part)
        group = dist.group.WORLD if mode == "pose parallel" else None
        combination = gradhooks.combinations.Boltzmann(0.5, learnable=mode != "sharded")
        options: dict[str, Any] = {"memory": 2_000, "process_group": group}
        self.scorer = gradhooks.MultiPose(self.model, combination, **options)
        self.module: nn.Module = DistributedDataParallel(self.scorer) if mode == "data parallel" else self.scorer
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.02)
        self.own_groups = mode != "one process"

    def step(self, number: int) -> None:
        rank = dist.get_rank() if self.own_groups else 0
        torch.manual_seed(100 * number + rank)
        groups = torch.arange(3).repeat_interleave(torch.randint(2, 6, (3,)))
        self.optimizer.zero_grad()
        self.module(torch.randn(len(groups), 8), groups=groups).combined.square().sum().backward()
        self.optimizer.step()

    def states(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        dcp.save(self.states(), checkpoint_id=folder)
        torch.save(self.scorer.learned, folder / f"learned {dist.get_rank()}.pt")

    def resume(self, folder: Path) -> None:
        states = self.states()
        dcp.load(states, checkpoint_id=folder)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        self.scorer.learned = torch.load(folder / f"learned {dist.get_rank()}.pt", weights_only=True)

    def weights(self) -> dict[str, Tensor]:
        return {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()
            for name, value in self.scorer.named_parameters()
        }


def train(mode: str, folder: Path, *, kill: bool) -> None:
    run, checkpoint = Run(mode), folder / mode
    start = 0
    if checkpoint.exists() and not kill:
        run.resume(checkpoint)
        start = SAVED
    for number in range(start, STEPS):
        if kill and number == SAVED:
            run.save(checkpoint)
            if mode != MODES[-1]:
                return
            run.model[3].kills = dist.get_rank() == 1
        run.step(number)
    weights = run.weights()
    if dist.get_rank() == 0:
        torch.save(weights, folder / f"{mode}.pt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for mode in MODES:
        train(mode, options.folder, kill=options.kill)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

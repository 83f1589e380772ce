"""The audit on several ranks: all find out the same, also one without poses, and on sharded parameters."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import error_of, run_on_ranks
from torch import Tensor, nn

import gradhooks


class Scored(nn.Module):
    """A model with a defect of one kind."""

    def __init__(self, defect: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 1)
        self.defect = defect
        self.kept: Any = None

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose).tanh()
        if self.defect == "side loss":
            self.kept = hidden.square().sum()
        if self.defect == "clamp" and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
        prediction: Tensor = self.last(hidden)
        return prediction


def poses_of_rank(rank: int, *, empty: bool) -> list[Tensor]:
    """Return the poses of a rank; rank 1 has none if `empty`."""
    generator = torch.Generator().manual_seed(rank)
    return list(torch.randn(0 if empty and rank == 1 else 3, 4, generator=generator, dtype=torch.float64))


def with_process_group(rank: int) -> dict[str, Any]:
    """Return what each defect leads to on this rank."""
    results: dict[str, Any] = {}
    for defect in ("side loss", "clamp"):
        for empty in (False, True):
            model = Scored(defect).double()
            scorer = gradhooks.MultiPose(model, "boltzmann", process_group=dist.group.WORLD)
            poses = poses_of_rank(rank, empty=empty)
            if defect == "side loss":
                results[f"{defect} {empty}"] = error_of(lambda scorer=scorer, poses=poses: scorer(poses))  # type: ignore[misc]
            else:
                scorer(poses).combined.sum().backward()
                results[f"{defect} {empty}"] = scorer.report.skipped, model.first.weight.grad.sum().item()  # type: ignore[union-attr]
    return results


def test_ranks_audit_alike() -> None:
    first, second = run_on_ranks(with_process_group)
    for empty in (False, True):
        assert "holds a tensor with a graph" in str(first[f"side loss {empty}"])
        assert "kept holds a tensor with a graph" in str(second[f"side loss {empty}"])
        assert first[f"clamp {empty}"] == second[f"clamp {empty}"]


def on_shards(rank: int) -> dict[str, Any]:
    """Return what each defect leads to on this rank, with parameters that are sharded over all ranks."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not imported by processes without shards

    results: dict[str, Any] = {}
    for defect in ("", "side loss", "clamp"):
        model = Scored(defect).double()
        fully_shard(model)
        scorer = gradhooks.MultiPose(model, "boltzmann")
        poses = poses_of_rank(rank, empty=False)

        def step(scorer: Any = scorer, poses: Any = poses) -> None:
            scorer(poses).combined.sum().backward()

        results[defect] = None if defect == "" and step() is None else error_of(step)
    return results


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 runs on a CPU from torch 2.7 on")
def test_shards_are_audited() -> None:
    for results in run_on_ranks(on_shards):
        assert results[""] is None
        assert "kept holds a tensor with a graph" in str(results["side loss"])
        assert "not proportional" in str(results["clamp"])

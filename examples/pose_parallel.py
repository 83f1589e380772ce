"""One group of 2000 conformers of a real ligand, shared by as many processes as `torchrun` starts.

    torchrun --nproc-per-node 2 examples/pose_parallel.py          # a minute on two cores; gloo on CPUs
    torchrun --nproc-per-node 8 examples/pose_parallel.py --device cuda --poses 100000     # nccl on GPUs
    python examples/pose_parallel.py --poses 200                   # one process, for comparison

Every rank embeds and runs its own conformers only. At the end one rank runs all of them alone, and compares the
gradients. The ligand comes with the rdkit wheel; nothing is downloaded.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from binding_affinity import CUTOFF, radius_graph
from conformers import Pose, ligands, sulfonamides
from torch import Tensor, nn
from torch_geometric.nn import SchNet

import gradhooks
from gradhooks.profiling import table

BLOCK = 100  # conformers that are embedded together; whole blocks go to a rank, so that all get the same conformers
LEARNING_RATE = 1e-3


class Result(NamedTuple):
    """What this rank has seen.

    Attributes:
        losses: Of each step; the same on every rank.
        seconds: Of the fastest step.
        deviation: Of the gradient from that of one process with all poses, relative to its largest number.
        predicted: Bytes of all predictions.
        gradient: Bytes of one gradient.
    """

    losses: list[float]
    seconds: float
    deviation: float
    predicted: int
    gradient: int


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="One huge group on several processes.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--poses", type=int, default=2000, help=f"conformers of the ligand, rounded up to {BLOCK}s")
    parser.add_argument("--steps", type=int, default=3, help="steps of the optimizer")
    combinations = gradhooks.registry.combinations.available()
    parser.add_argument("--combination", choices=combinations, default="boltzmann", help="of the conformers' energies")
    accumulators = gradhooks.registry.accumulators.available()
    parser.add_argument("--accumulator", choices=accumulators, default="auto", help="how their gradients are summed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where each rank computes")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument(
        "--cache", type=Path, default=Path(__file__).parents[1] / ".cache" / "conformers", help="keeps the conformers"
    )
    options = parser.parse_args(argv)
    if options.poses < 1 or options.steps < 1:
        parser.error("--poses and --steps must be at least 1")
    return options


def conformers(blocks: Sequence[int], options: argparse.Namespace, device: torch.device) -> tuple[list[Pose], Tensor]:
    """The conformers of some blocks, each of which has a seed of its own, and the measured free energy."""
    ligand = min(sulfonamides(), key=lambda one: (one.molecule.GetNumHeavyAtoms(), one.name))
    poses: list[Pose] = []
    for block in blocks:
        (loaded,) = ligands([ligand], BLOCK, block, options.cache, device)
        poses += [(kinds, positions.double() if options.double else positions) for kinds, positions in loaded.poses]
    return poses, torch.tensor([[ligand.free_energy]], device=device)


def share(blocks: int, rank: int, ranks: int) -> range:
    """The blocks of a rank: one after the other, as equal as can be."""
    return range(blocks * rank // ranks, blocks * (rank + 1) // ranks)


def gradient_of(model: nn.Module) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([leaf.grad.flatten() for leaf in model.parameters() if leaf.grad is not None])


def train(options: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> Result:
    """A few steps on the shared group, and its last gradient beside that of one process."""
    torch.manual_seed(options.seed)
    schnet = SchNet(32, 32, 3, 25, CUTOFF, radius_graph, readout="mean", mean=-11.0, std=1.5).to(device)
    schnet.to(torch.float64 if options.double else torch.float32)
    group = dist.group.WORLD if dist.is_initialized() else None
    scorer = gradhooks.MultiPose(
        schnet, options.combination, accumulator=options.accumulator, process_group=group
    )  # the one line
    optimizer = torch.optim.SGD(schnet.parameters(), lr=LEARNING_RATE)
    blocks = -(-options.poses // BLOCK)
    poses, measured = conformers(share(blocks, rank, ranks), options, device)
    losses, seconds = [], []
    for step in range(options.steps):
        start = time.perf_counter()
        combined, predictions = scorer(poses)
        loss = (combined - measured).square().sum()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if step < options.steps - 1:
            optimizer.step()
    shared = gradient_of(schnet)
    deviation = 0.0
    if rank == 0:
        alone = gradhooks.MultiPose(schnet, options.combination, accumulator=options.accumulator)
        optimizer.zero_grad()
        (alone(conformers(range(blocks), options, device)[0]).combined - measured).square().sum().backward()
        deviation = ((gradient_of(schnet) - shared).abs().max() / shared.abs().max()).item()
    return Result(losses, min(seconds), deviation, predictions.nbytes, shared.nbytes)


def report(result: Result, options: argparse.Namespace, ranks: int) -> str:
    """What the first rank prints."""
    rows = [
        ["poses, on ranks", f"{-(-options.poses // BLOCK) * BLOCK}, on {ranks}"],
        ["loss, (kcal/mol)^2", " ".join(f"{loss:.5f}" for loss in result.losses)],
        ["seconds a step", f"{result.seconds:.2f}"],
        ["travels a step", f"{result.predicted / 1e3:.1f} kB predictions, {result.gradient / 1e3:.1f} kB gradient"],
        ["gradient, beside one process", f"{result.deviation:.1e} relative"],
    ]
    return table(["", "pose parallel"], rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run one rank."""
    options = arguments(argv)
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        result = train(options, rank, ranks, device)
        if rank == 0:
            print(report(result, options, ranks))
        if ranks > 1:
            dist.barrier()  # the others wait for the comparison
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()

"""Share one group of 2000 conformers of a ligand between the processes that `torchrun` starts.

    torchrun --nproc-per-node 2 examples/pose_parallel.py          # a minute on two cores; gloo on CPUs
    torchrun --nproc-per-node 8 examples/pose_parallel.py --device cuda --poses 100000     # nccl on GPUs
    python examples/pose_parallel.py --poses 200                   # one process, for comparison

Every rank embeds and runs its own conformers only. At the end, rank 0 runs all of them and compares the gradients. The
ligand comes with the rdkit wheel; nothing is downloaded.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from conformers import CUTOFF, Pose, collate_molecules, load_ligands, radius_graph, sulfonamides
from tabulate import tabulate
from torch import Tensor, nn
from torch_geometric.nn import SchNet

import gradhooks

LEARNING_RATE = 1e-3


class Result(NamedTuple):
    """The measurements of this rank.

    Attributes:
        losses: The loss of each step; the same on every rank.
        seconds: Duration of the fastest step.
        deviation: Largest difference of the gradient from that of one process, relative to its largest element.
        prediction_bytes: Size of all predictions.
        gradient_bytes: Size of one gradient.
    """

    losses: list[float]
    seconds: float
    deviation: float
    prediction_bytes: int
    gradient_bytes: int


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="One large group on several processes.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--poses", type=int, default=2000, help="conformers, rounded up to whole blocks")
    # Ranks get whole blocks, so the conformers do not depend on the number of ranks.
    parser.add_argument("--block", type=int, default=100, help="conformers that are embedded together")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    combinations = gradhooks.registry.combinations.available()
    parser.add_argument("--combination", choices=combinations, default="boltzmann", help="combines the energies")
    accumulators = gradhooks.registry.accumulators.available()
    parser.add_argument("--accumulator", choices=accumulators, default="auto", help="sums the gradients")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of each rank")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument(
        "--cache", type=Path, default=Path(__file__).parents[1] / ".cache" / "conformers", help="stores the conformers"
    )
    options = parser.parse_args(argv)
    if options.poses < 1 or options.steps < 1:
        parser.error("--poses and --steps must be at least 1")
    return options


def conformers(blocks: Sequence[int], options: argparse.Namespace, device: torch.device) -> tuple[list[Pose], Tensor]:
    """Return the conformers of some blocks, each with its own seed, and the measured free energy."""
    ligand = min(sulfonamides(), key=lambda measured: (measured.molecule.GetNumHeavyAtoms(), measured.name))
    poses: list[Pose] = []
    for block in blocks:
        (loaded,) = load_ligands([ligand], options.block, block, options.cache, device)
        poses += [(numbers, positions.double() if options.double else positions) for numbers, positions in loaded.poses]
    return poses, torch.tensor([ligand.free_energy], device=device)


def blocks_of(rank: int, blocks: int, ranks: int) -> range:
    """Return the blocks of a rank: consecutive ones, in numbers that differ by at most one between ranks."""
    return range(blocks * rank // ranks, blocks * (rank + 1) // ranks)


def gradient_of(model: nn.Module) -> Tensor:
    """Return all gradients as one vector."""
    return torch.cat([leaf.grad.flatten() for leaf in model.parameters() if leaf.grad is not None])


def train(options: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> Result:
    """Run a few steps on the shared group, and compare its last gradient with that of one process."""
    torch.manual_seed(options.seed)
    schnet = SchNet(32, 32, 3, 25, CUTOFF, radius_graph, readout="mean", mean=-11.0, std=1.5).to(device)
    schnet.to(torch.float64 if options.double else torch.float32)
    group = dist.group.WORLD if dist.is_initialized() else None
    scorer = gradhooks.MultiPose(
        schnet,
        options.combination,
        accumulator=options.accumulator,
        collate=collate_molecules,  # the conformers of a rank run in chunks that fit in memory
        process_group=group,
    )
    optimizer = torch.optim.SGD(schnet.parameters(), lr=LEARNING_RATE)
    blocks = -(-options.poses // options.block)
    poses, measured = conformers(blocks_of(rank, blocks, ranks), options, device)
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
    deviation = deviation_from_one_process(schnet, range(blocks), options, device) if rank == 0 else 0.0
    return Result(losses, min(seconds), deviation, predictions.nbytes, shared.nbytes)


def deviation_from_one_process(
    model: nn.Module, blocks: Sequence[int], options: argparse.Namespace, device: torch.device
) -> float:
    """Run all poses on this rank and return the largest difference of a gradient, relative to the largest element."""
    shared = gradient_of(model)
    model.zero_grad()
    poses, measured = conformers(blocks, options, device)
    scorer = gradhooks.MultiPose(model, options.combination, accumulator=options.accumulator)
    (scorer(poses).combined - measured).square().sum().backward()
    return ((gradient_of(model) - shared).abs().max() / shared.abs().max()).item()


def report(result: Result, options: argparse.Namespace, ranks: int) -> str:
    """Return the table that the first rank prints."""
    rows = [
        ["poses, on ranks", f"{-(-options.poses // options.block) * options.block}, on {ranks}"],
        ["loss, (kcal/mol)^2", " ".join(f"{loss:.5f}" for loss in result.losses)],
        ["seconds per step", f"{result.seconds:.2f}"],
        [
            "sent per step",
            f"{result.prediction_bytes / 1e3:.1f} kB predictions, {result.gradient_bytes / 1e3:.1f} kB gradient",
        ],
        ["difference from one process", f"{result.deviation:.1e} relative"],
    ]
    return tabulate(rows, ["", "pose parallel"], tablefmt="pipe", disable_numparse=True, colalign=("left", "right"))


def main(argv: Sequence[str] | None = None) -> Result:
    """Run one rank."""
    options = parse_arguments(argv)
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
            dist.barrier()  # wait for the comparison on rank 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()

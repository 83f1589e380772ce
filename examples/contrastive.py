"""Train two encoders of the same molecule on each other: a graph network on its bonds, SchNet on its conformers.

    python examples/contrastive.py                  # two minutes on two cores
    python examples/contrastive.py --memory 0       # with the memory of one conformer

The embeddings of the conformers of a molecule are pooled, and every other molecule of the batch is a negative: groups
and negatives in one loss. The measure is retrieval among molecules that were held out: is the conformers' embedding
nearest to that of the right graph? Larger batches have more negatives; each size has as many optimizer steps, so they
also see more molecules. At the end, a step on a large batch is measured
beside one full graph and GradCache's two passes. The molecules come with the rdkit wheel.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from conformers import load_ligands, split, sulfonamides
from contrastive_costs import Cost, costs
from matplotlib.figure import Figure
from molecule_encoders import Encoders, Molecules, bond_graph, make_encoders, similarity
from tabulate import tabulate
from tqdm import tqdm

from gradhooks.units import format_bytes, format_seconds

RANKS = (1, 10)


class Trained(NamedTuple):
    """What training with batches of one size gives: the accuracy at each of `RANKS`, and the loss of each step."""

    batch_size: int
    accuracy: tuple[float, ...]
    losses: list[float]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Contrastive training of two encoders.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--molecules", type=int, default=400, help="maximum number; every fourth is held out")
    parser.add_argument("--poses", type=int, default=2, help="conformers per molecule")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps with each size of a batch")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 8, 32], help="molecules of a batch")
    parser.add_argument("--combination", default="mean", help="pools the embeddings of the conformers")
    parser.add_argument("--memory", default="1GiB", help="of a step beyond that of one conformer: bytes, 64MiB, ...")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of Adam, at its peak")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the conformers, the weights and the order")
    parser.add_argument("--output", type=Path, default=Path("contrastive.png"), help="file of the plot")
    parser.add_argument(
        "--cache", type=Path, default=Path(__file__).parents[1] / ".cache" / "conformers", help="stores the conformers"
    )
    options = parser.parse_args(argv)
    for name, minimum in {"molecules": 8, "poses": 1, "steps": 1, "seed": 0}.items():
        if getattr(options, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}")
    return options


def load(options: argparse.Namespace) -> tuple[Molecules, Molecules]:
    """Return the training and the held-out molecules."""
    parts = split(sulfonamides(), options.molecules, options.seed)
    loaded = []
    for name, measured in zip(("training", "held out"), parts, strict=True):
        ligands = load_ligands(measured, options.poses, options.seed, options.cache, options.device)
        conformers = [ligand.poses for ligand in tqdm(ligands, total=len(measured), desc=f"conformers, {name}")]
        loaded.append(Molecules([bond_graph(each.molecule, options.device) for each in measured], conformers))
    return loaded[0], loaded[1]


def train(
    encoders: Encoders, options: argparse.Namespace, batch_size: int, training: Molecules, held_out: Molecules
) -> Trained:
    """Train with batches of one size, for as many optimizer steps as with any other size."""
    optimizer = torch.optim.Adam(encoders.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.steps + 1, pct_start=0.2)
    order: list[int] = []
    losses = []
    for _ in tqdm(range(options.steps), desc=f"batches of {batch_size}", unit="step"):
        if len(order) < batch_size:
            order = torch.randperm(len(training.graphs)).tolist()
        batch, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        loss = encoders.loss(*training.batch(batch))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return Trained(batch_size, retrieval(encoders, held_out), losses)


@torch.no_grad()
def retrieval(encoders: Encoders, molecules: Molecules) -> tuple[float, ...]:
    """Return for each of `RANKS` how often the right graph is among as many that are nearest to the conformers."""
    graphs, groups = molecules.batch(range(len(molecules.graphs)))
    scores = similarity(encoders.conformer(groups).combined, encoders.graph(graphs).per_pose)
    better = (scores > scores.diagonal()[:, None]).sum(1)
    return tuple((better < rank).double().mean().item() for rank in RANKS)


def tables(trained: Sequence[Trained], measured: Sequence[Cost], held_out: int) -> str:
    """Return accuracies and costs as text."""
    chance = [f"{min(1.0, rank / held_out):.1%}" for rank in RANKS]
    rows = [["chance", *chance]]
    rows += [[f"batches of {each.batch_size}", *(f"{share:.1%}" for share in each.accuracy)] for each in trained]
    headers = [f"retrieval among {held_out} held out", *(f"at {rank}" for rank in RANKS)]
    accuracy = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", "right", "right"))
    lines = [
        [each.way, format_seconds(each.seconds), format_bytes(each.peak), f"{each.error:.1e}"] for each in measured
    ]
    headers = ["step on a large batch", "time", "peak", "gradient error"]
    return f"{accuracy}\n\n{tabulate(lines, headers, tablefmt='pipe', disable_numparse=True)}"


def plot(trained: Sequence[Trained], held_out: int, path: Path) -> None:
    """Draw accuracy against batch size, beside chance."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    sizes = [each.batch_size for each in trained]
    for number, rank in enumerate(RANKS):
        (line,) = axes.plot(sizes, [each.accuracy[number] for each in trained], marker="o", label=f"at {rank}")
        axes.axhline(rank / held_out, color=line.get_color(), linestyle=":", label=f"at {rank}, chance")
    axes.set(xscale="log", xlabel="molecules of a batch", ylabel="retrieval accuracy, held out", ylim=(0, 1))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> tuple[list[Trained], list[Cost]]:
    """Run, print and plot."""
    options = parse_arguments(argv)
    torch.set_num_threads(1)  # so that every machine adds in one order
    training, held_out = load(options)
    if not 1 < min(options.batch_sizes) <= max(options.batch_sizes) <= len(training.graphs):
        raise SystemExit(f"--batch-sizes must be from 2 to {len(training.graphs)}, the molecules for training")
    make: Callable[..., Encoders] = partial(make_encoders, options.seed, options.combination, options.device)
    trained = [
        train(make(memory=options.memory), options, size, training, held_out) for size in sorted(options.batch_sizes)
    ]
    measured = costs(training, make, options.device)
    count = len(held_out.graphs)
    plot(trained, count, options.output)
    print(f"\n{tables(trained, measured, count)}\n\nplot: {options.output}")
    return trained, measured


if __name__ == "__main__":
    main()

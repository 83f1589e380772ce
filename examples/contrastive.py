"""Train two encoders of the same molecule on each other: a graph network on its bonds, SchNet on its conformers.

    python examples/contrastive.py                  # two minutes on two cores
    python examples/contrastive.py --memory 0       # with the memory of one conformer

The embeddings of the conformers of a molecule are pooled, and every other molecule of the batch is a negative: groups
and negatives in one loss. The measure is retrieval among molecules that were held out: is the conformers' embedding
nearest to that of the right graph? Larger batches have more negatives. At the end, a step on a large batch is measured
beside one full graph and GradCache's two passes. The molecules come with the rdkit wheel.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conformers import Pose, collate_molecules, load_ligands, split, sulfonamides
from matplotlib.figure import Figure
from molecule_encoders import Graph, GraphEncoder, bond_graph, collate_graphs, conformer_encoder
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import gradhooks
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.timing import interleaved_seconds
from gradhooks.units import format_bytes, format_seconds

TEMPERATURE = 0.1
CHUNK = 8  # conformers of a chunk where memory is least, and in GradCache's passes
COST_MOLECULES = 64  # of the step that is measured
RANKS = (1, 10)


class Molecules(NamedTuple):
    """Molecules, each with its graph and with its conformers."""

    graphs: list[Graph]
    conformers: list[list[Pose]]

    def batch(self, indices: Sequence[int]) -> tuple[list[Graph], gradhooks.Groups]:
        """Return graphs, and conformers in groups."""
        groups: gradhooks.Groups = gradhooks.collate_groups([self.conformers[index] for index in indices])
        return [self.graphs[index] for index in indices], groups


class Encoders(NamedTuple):
    """The two encoders, as scorers."""

    graph: gradhooks.MultiPose[GraphEncoder]
    conformer: gradhooks.MultiPose[nn.Module]

    def parameters(self) -> list[nn.Parameter]:
        return [*self.graph.parameters(), *self.conformer.parameters()]

    def loss(self, graphs: list[Graph], groups: gradhooks.Groups) -> Tensor:
        return info_nce(self.graph(graphs).per_pose, self.conformer(groups).combined)


class Trained(NamedTuple):
    """What training with batches of one size gives: the accuracy at each of `RANKS`, and the loss of each step."""

    batch_size: int
    accuracy: tuple[float, ...]
    losses: list[float]


class Cost(NamedTuple):
    """What a step on a large batch costs.

    Attributes:
        way: How it is run.
        seconds: Duration of the fastest of a few.
        peak: Bytes.
        error: Largest difference of a gradient from the full graph's, relative to the largest gradient.
    """

    way: str
    seconds: float
    peak: int
    error: float


Step = Callable[[Encoders, list[Graph], gradhooks.Groups], None]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Contrastive training of two encoders.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--molecules", type=int, default=400, help="maximum number; every fourth is held out")
    parser.add_argument("--poses", type=int, default=2, help="conformers per molecule")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training molecules")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 16], help="molecules of a batch")
    parser.add_argument("--combination", default="mean", help="pools the embeddings of the conformers")
    parser.add_argument(
        "--memory", type=_memory, default="1GiB", help="of a step beyond that of one conformer: bytes, 64MiB, ..."
    )
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="the largest one")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the conformers, the weights and the order")
    parser.add_argument("--output", type=Path, default=Path("contrastive.png"), help="file of the plot")
    parser.add_argument(
        "--cache", type=Path, default=Path(__file__).parents[1] / ".cache" / "conformers", help="stores the conformers"
    )
    options = parser.parse_args(argv)
    if any(max(options.batch_sizes) % size for size in options.batch_sizes):
        parser.error("--batch-sizes must divide the largest of them")
    for name, minimum in {"molecules": 8, "poses": 1, "epochs": 1, "seed": 0}.items():
        if getattr(options, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}")
    return options


def _memory(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def load(options: argparse.Namespace) -> tuple[Molecules, Molecules]:
    """Return the training and the held-out molecules."""
    parts = split(sulfonamides(), options.molecules, options.seed)
    loaded = []
    for name, measured in zip(("training", "held out"), parts, strict=True):
        ligands = load_ligands(measured, options.poses, options.seed, options.cache, options.device)
        conformers = [ligand.poses for ligand in tqdm(ligands, total=len(measured), desc=f"conformers, {name}")]
        loaded.append(Molecules([bond_graph(each.molecule, options.device) for each in measured], conformers))
    return loaded[0], loaded[1]


def make_encoders(options: argparse.Namespace) -> Encoders:
    """Return untrained encoders, the same for the same seed."""
    torch.manual_seed(options.seed)
    graph = gradhooks.MultiPose(GraphEncoder(), None, collate=collate_graphs, memory=options.memory)
    conformer = gradhooks.MultiPose(
        conformer_encoder(), options.combination, collate=collate_molecules, memory=options.memory
    )
    return Encoders(graph.to(options.device), conformer.to(options.device))


def info_nce(graphs: Tensor, conformers: Tensor) -> Tensor:
    """Return the mean of both directions: which conformers belong to a graph, and which graph to conformers."""
    scores = similarity(graphs, conformers) / TEMPERATURE
    labels = torch.arange(len(scores), device=scores.device)
    return (nn.functional.cross_entropy(scores, labels) + nn.functional.cross_entropy(scores.T, labels)) / 2


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each pair of embeddings."""
    return nn.functional.normalize(first, dim=-1) @ nn.functional.normalize(second, dim=-1).T


def train(options: argparse.Namespace, batch_size: int, training: Molecules, held_out: Molecules) -> Trained:
    """Train new encoders with negatives from batches of one size.

    Every optimizer step is on as many molecules as the largest batch has, in several batches if they are smaller, which
    is what gradient accumulation can do with little memory. So only the number of negatives differs.
    """
    encoders = make_encoders(options)
    optimizer = torch.optim.Adam(encoders.parameters(), lr=options.learning_rate)
    count, step_size = len(training.graphs), max(options.batch_sizes)
    steps = options.epochs * (count // step_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, max(2, steps), pct_start=0.2)
    losses = []
    for _ in tqdm(range(options.epochs), desc=f"batches of {batch_size}", unit="epoch"):
        order = torch.randperm(count).tolist()
        for first in range(0, count - step_size + 1, step_size):
            optimizer.zero_grad()
            for start in range(first, first + step_size, batch_size):
                loss = encoders.loss(*training.batch(order[start : start + batch_size]))
                (loss * batch_size / step_size).backward()
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


def full_graph(encoders: Encoders, graphs: list[Graph], groups: gradhooks.Groups) -> None:
    """Fill `.grad` with the graph of the whole batch in memory."""
    embeddings = encoders.conformer.model(*collate_molecules(groups.poses))
    pooled = encoders.conformer.combination.forward_groups(embeddings, groups.index, int(groups.index.max()) + 1)
    info_nce(encoders.graph.model(*collate_graphs(graphs)), pooled).backward()


def two_passes(encoders: Encoders, graphs: list[Graph], groups: gradhooks.Groups) -> None:
    """Fill `.grad` as GradCache does (Gao et al., 2021, arXiv:2101.06983): embeddings first, then chunks again."""
    sides = [
        (encoders.graph.model, [collate_graphs(graphs[i : i + CHUNK]) for i in range(0, len(graphs), CHUNK)]),
        (
            encoders.conformer.model,
            [collate_molecules(groups.poses[i : i + CHUNK]) for i in range(0, len(groups), CHUNK)],
        ),
    ]
    with torch.no_grad():
        cached = [torch.cat([model(*chunk) for chunk in chunks]).requires_grad_() for model, chunks in sides]
    pooled = encoders.conformer.combination.forward_groups(cached[1], groups.index, len(graphs))
    info_nce(cached[0], pooled).backward()
    for (model, chunks), embeddings in zip(sides, cached, strict=True):
        for chunk, gradient in zip(chunks, embeddings.grad.split(CHUNK), strict=True):
            torch.autograd.backward(model(*chunk), gradient)


def _chunks(poses: list[Any], collate: Callable[[list[Any]], Any]) -> list[Any]:
    return [collate(poses[start : start + CHUNK]) for start in range(0, len(poses), CHUNK)]


def with_scorers(encoders: Encoders, graphs: list[Graph], groups: gradhooks.Groups) -> None:
    """Fill `.grad` by the loss that the training uses."""
    encoders.loss(graphs, groups).backward()


def costs(options: argparse.Namespace, molecules: Molecules) -> list[Cost]:
    """Measure a step on a batch of `COST_MOLECULES`."""
    graphs, groups = molecules.batch(range(min(COST_MOLECULES, len(molecules.graphs))))
    steps = {"full graph, batched": (make_encoders(options), full_graph)}
    steps["GradCache's two passes"] = (make_encoders(options), two_passes)
    for memory in ("1GiB", "8MiB", 0):
        encoders = make_encoders(options)
        for scorer in encoders:
            scorer.memory = memory
            scorer.chunk_size = None if memory else CHUNK
        steps[f"MultiPose, memory={memory}"] = (encoders, with_scorers)
    runs = [partial(_run, encoders, step, graphs, groups) for encoders, step in steps.values()]
    for run in runs * 2:  # in which needs are measured
        run()
    gradients = [
        torch.cat([leaf.grad.flatten() for leaf in encoders.parameters() if leaf.grad is not None])
        for encoders, _ in steps.values()
    ]
    errors = [((each - gradients[0]).abs().max() / gradients[0].abs().max()).item() for each in gradients]
    peaks = [peak_bytes(run, options.device) for run in runs]
    seconds = [min(times) for times in interleaved_seconds(runs, 3, options.device)]
    return [Cost(*row) for row in zip(steps, seconds, peaks, errors, strict=True)]


def _run(encoders: Encoders, step: Step, graphs: list[Graph], groups: gradhooks.Groups) -> None:
    for leaf in encoders.parameters():
        leaf.grad = None
    step(encoders, graphs, groups)


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
    trained = [train(options, size, training, held_out) for size in sorted(options.batch_sizes)]
    measured = costs(options, training)
    count = len(held_out.graphs)
    plot(trained, count, options.output)
    print(f"\n{tables(trained, measured, count)}\n\nplot: {options.output}")
    return trained, measured


if __name__ == "__main__":
    main()

"""Train SchNet on measured binding free energies, by batches of ligands with N conformers each.

    python examples/binding_affinity.py                     # a minute on two cores
    python examples/binding_affinity.py --memory 0          # with the memory of one conformer
    python examples/binding_affinity.py --combination min --poses 8
    python examples/binding_affinity.py --ligands cmet      # poses in the binding site; 24 ligands are too few to learn

All conformers of a batch are one call of `MultiPose`. At the end, a training step is measured in every way that PyTorch
offers and with several values of `memory=`. The data comes with the rdkit wheel; nothing is downloaded. On a CPU,
repeated runs of a command print the same numbers, except for times.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from conformers import CUTOFF, SOURCES, Ligand, Pose, collate_molecules, load_ligands, radius_graph, split
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader
from torch_geometric.nn import SchNet
from tqdm import tqdm

import gradhooks
from gradhooks.profiling.comparison import Comparison

BATCH_SIZE = 4  # ligands per optimizer step
LEARNING_RATE = 5e-3
# The training step is measured for a batch, and for one with more conformers, with these values of `memory=`, the
# default and 0.
BUDGETS = {1: ("4MiB",), 4: ("32MiB", "8MiB", "2MiB")}


class Result(NamedTuple):
    """The contents of the tables and the plot.

    Attributes:
        baseline: The training mean, as predictions for the training and the held-out ligands.
        predictions: The predictions of the model for them.
        targets: The measured values. All in kcal/mol, of shape `(ligands,)`.
        curve: For each epoch, the RMSE during training and then on the held-out ligands.
        costs: Comparisons of a training step, for a batch and for one with more conformers.
    """

    baseline: tuple[Tensor, Tensor]
    predictions: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    curve: list[tuple[float, float]]
    costs: list[Comparison]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="SchNet on batches of ligands with several conformers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ligands", choices=list(SOURCES), default="sulfonamides", help="data set")
    parser.add_argument("--molecules", type=int, default=320, help="maximum number; every fourth is held out")
    parser.add_argument("--poses", type=int, default=4, help="conformers per molecule")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training molecules")
    combinations = gradhooks.registry.combinations.available()
    parser.add_argument("--combination", choices=combinations, default="boltzmann", help="combines the energies")
    accumulators = gradhooks.registry.accumulators.available()
    parser.add_argument("--accumulator", choices=accumulators, default="auto", help="sums the gradients")
    parser.add_argument("--memory", default="1GiB", help="of a step beyond that of one conformer: bytes, 64MiB, ...")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the conformers, the weights and the order")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of the training steps that are compared")
    parser.add_argument("--output", type=Path, default=Path("binding_affinity.png"), help="file of the plot")
    parser.add_argument(
        "--cache", type=Path, default=Path(__file__).parents[1] / ".cache" / "conformers", help="stores the conformers"
    )
    options = parser.parse_args(argv)
    for name, minimum in {"molecules": 4, "poses": 1, "epochs": 1, "seed": 0}.items():
        if getattr(options, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}")
    return options


def load(options: argparse.Namespace) -> tuple[list[Ligand], list[Ligand]]:
    """Return the training and the held-out ligands with their conformers."""
    training, held_out = split(SOURCES[options.ligands](), options.molecules, options.seed)
    molecules = training + held_out
    loading = load_ligands(molecules, options.poses, options.seed, options.cache, options.device)
    ligands = list(tqdm(loading, total=len(molecules), desc="conformers", unit="ligand"))
    return ligands[: len(training)], ligands[len(training) :]


def train(
    scorer: gradhooks.MultiPose, training: list[Ligand], held_out: list[Ligand], epochs: int
) -> list[tuple[float, float]]:
    """Train, and return for each epoch the RMSE during training and then on the held-out ligands."""
    optimizer = torch.optim.Adam(scorer.parameters(), lr=LEARNING_RATE)
    loader = DataLoader(training, BATCH_SIZE, shuffle=True, collate_fn=gradhooks.collate_groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, steps=epochs * len(loader)))
    curve = []
    with tqdm(total=epochs * len(training), desc="training", unit="ligand") as progress:
        for _ in range(epochs):
            squares = []
            for groups, target in loader:
                optimizer.zero_grad()
                square = (scorer(groups).combined - target).square()
                square.mean().backward()
                optimizer.step()
                schedule.step()
                squares.append(square.detach())
                progress.update(len(target))
            predicted, measured = predict(scorer, held_out)
            curve.append((torch.cat(squares).mean().sqrt().item(), rmse(predicted - measured)))
            progress.set_postfix({"RMSE": f"{curve[-1][0]:.2f}", "held out": f"{curve[-1][1]:.2f} kcal/mol"})
    return curve


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate relative to its peak: it rises in the first fifth of the steps and ends at 0."""
    return min(1.0, 5 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def predict(scorer: gradhooks.MultiPose, ligands: list[Ligand]) -> tuple[Tensor, Tensor]:
    """Return predicted and measured free energies, shape `(ligands,)`."""
    groups, measured = gradhooks.collate_groups(ligands)
    return scorer(groups).combined.flatten().cpu(), measured.flatten().cpu()


def rmse(errors: Tensor) -> float:
    """Return the root mean square."""
    return errors.square().mean().sqrt().item()


def run(options: argparse.Namespace) -> Result:
    """Load the data, train, predict and measure the cost of a training step."""
    # Kernels as small as these gain nothing from a second thread, and with one thread every machine adds in one order.
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    training, held_out = load(options)
    measured = torch.cat([ligand.free_energy for ligand in training])
    mean, deviation = measured.mean().item(), measured.std().item()
    schnet = SchNet(32, 32, 3, 25, CUTOFF, radius_graph, readout="mean", mean=mean, std=deviation)
    scorer = gradhooks.MultiPose(schnet, options.combination, accumulator=options.accumulator)
    scorer.memory, scorer.collate = options.memory, collate_molecules
    scorer.to(options.device)
    curve = train(scorer, training, held_out, options.epochs)
    fitted, unseen = predict(scorer, training), predict(scorer, held_out)
    return Result(
        baseline=(torch.full_like(fitted[0], mean), torch.full_like(unseen[0], mean)),
        predictions=(fitted[0], unseen[0]),
        targets=(fitted[1], unseen[1]),
        curve=curve,
        costs=[step_costs(scorer, held_out[:BATCH_SIZE], times, options.repeats) for times in BUDGETS],
    )


def step_costs(scorer: gradhooks.MultiPose, ligands: list[Ligand], times: int = 1, repeats: int = 3) -> Comparison:
    """Measure a training step on a batch of ligands with `times` as many conformers."""
    groups, target = gradhooks.collate_groups([(jittered(poses, times), energy) for poses, energy in ligands])
    return gradhooks.compare(
        scorer.model,
        groups,
        scorer.combination,
        budgets=BUDGETS[times],
        loss=lambda prediction: (prediction.combined - target).square().mean(),
        repeats=repeats,
        collate=collate_molecules,
    )


def jittered(poses: list[Pose], times: int) -> list[Pose]:
    """Return the poses and copies of them moved by a tenth of an Angstrom, `times` as many in total."""
    return poses + [
        (numbers, positions + 0.1 * torch.randn_like(positions))
        for _ in range(times - 1)
        for numbers, positions in poses
    ]


def tables(options: argparse.Namespace, result: Result) -> str:
    """Return errors and costs as text."""
    sizes = [len(target) for target in result.targets]
    title = f"{options.ligands}: {sizes[0]} for training, {sizes[1]} held out; {options.poses} poses each"
    models = {"training mean": result.baseline, f"SchNet, {options.combination}": result.predictions}
    rows = []
    for name, predictions in models.items():
        fitted, unseen = (predicted - target for predicted, target in zip(predictions, result.targets, strict=True))
        rows.append([name, rmse(fitted), fitted.abs().mean().item(), rmse(unseen), unseen.abs().mean().item()])
    headers = ["error, kcal/mol", "train RMSE", "train MAE", "held-out RMSE", "held-out MAE"]
    lines = [f"{title}, {options.epochs} epochs", "", tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f")]
    for cost in result.costs:
        lines += ["", f"a training step ({cost.setting})", str(cost)]
    return "\n".join(lines)


def plot(result: Result, path: Path) -> None:
    """Draw predicted against measured energies, the learning curve, and the time of a step against its memory."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    scatter, curve, costs = figure.subplots(1, 3)
    _plot_predictions(scatter, result)
    epochs = range(1, len(result.curve) + 1)
    for errors, label in zip(zip(*result.curve, strict=True), ("during training", "held out"), strict=True):
        curve.plot(epochs, errors, marker="o", markersize=3, label=label)
    baseline = rmse(result.baseline[1] - result.targets[1])
    curve.axhline(baseline, color="gray", linestyle="--", label="training mean, held out")
    curve.set(xlabel="epoch", ylabel="RMSE, kcal/mol", title="learning curve")
    curve.legend()
    _plot_costs(costs, result.costs[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _plot_costs(axes: Axes, cost: Comparison) -> None:
    points = {row.name: (row.peak_bytes / 2**20, 1000 * row.seconds) for row in cost.rows}
    curve = sorted(point for name, point in points.items() if name.startswith("MultiPose"))
    axes.plot(*zip(*curve, strict=True), marker="o", label="MultiPose, by memory=")
    for name, point in points.items():
        if not name.startswith("MultiPose"):
            axes.scatter(*point, label=name)
    axes.set(xlabel="peak memory of a step, MiB", ylabel="time, ms", xscale="log", title=f"{cost.poses} poses")
    axes.set_ylim(bottom=0)
    axes.legend()


def _plot_predictions(axes: Axes, result: Result) -> None:
    for predicted, measured, label in zip(result.predictions, result.targets, ("training", "held out"), strict=True):
        axes.scatter(measured, predicted, s=10, alpha=0.6, label=label)
    energies = torch.cat([*result.predictions, *result.targets])
    ends = [energies.min().item(), energies.max().item()]
    axes.plot(ends, ends, color="gray", linewidth=0.8)
    axes.set(xlabel="measured, kcal/mol", ylabel="predicted, kcal/mol", title="binding free energy", aspect="equal")
    axes.legend()


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and plot."""
    options = parse_arguments(argv)
    result = run(options)
    plot(result, options.output)
    print(f"\n{tables(options, result)}\n\nplot: {options.output}")


if __name__ == "__main__":
    main()

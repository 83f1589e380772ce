"""Train SchNet on groups of conformers in a Lightning Trainer, with an ordinary module and `training_step`.

    python examples/with_lightning.py                            # half a minute on one core
    python examples/with_lightning.py --precision bf16-mixed
    python examples/with_lightning.py --accelerator gpu

A batch is four ligands, that is four groups of poses in one call of the scorer. The data comes with the rdkit wheel;
nothing is downloaded.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from conformers import CUTOFF, Ligand, collate_molecules, load_ligands, radius_graph, split, sulfonamides
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_geometric.nn import SchNet

import gradhooks

POSES = 4
BATCH_SIZE = 4
LEARNING_RATE = 5e-3
Batch = tuple[gradhooks.Groups, Tensor]


class BindingAffinity(pl.LightningModule):
    """A module that learns free energies; it does not depend on how `scorer` computes gradients."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def squared_error(self, batch: Batch) -> Tensor:
        """Return the mean squared error of the predicted free energies, in (kcal/mol)^2."""
        groups, measured = batch
        square: Tensor = (self.scorer(groups).combined - measured).square().mean()
        return square

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Return the loss."""
        return self.squared_error(batch)

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> None:
        """Log the squared error, which Lightning averages over each loader."""
        del dataloader_idx
        self.log("squared error", self.squared_error(batch), batch_size=len(batch[1]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the scorer has learned: a resumed run then has the same bits as one that was not stopped."""
        checkpoint["learned"] = self.scorer.learned

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what the scorer has learned."""
        self.scorer.learned = checkpoint["learned"]

    def configure_optimizers(self) -> dict[str, Any]:
        """Return Adam with a learning rate that ends near 0."""
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader_of(ligands: Sequence[Ligand], *, shuffle: bool = False) -> DataLoader[Ligand]:
    """Return a loader of batches of ligands, each with the conformers of all of them."""
    return DataLoader(ligands, BATCH_SIZE, shuffle=shuffle, collate_fn=gradhooks.collate_groups)


def train(
    scorer: nn.Module, training: Sequence[Ligand], held_out: Sequence[Ligand], **options: Any
) -> tuple[list[float], list[float]]:
    """Train, and return the RMSE on training and held-out ligands before and after; `options` go to `pl.Trainer`."""
    module = BindingAffinity(scorer)
    trainer = pl.Trainer(devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False, **options)

    def errors() -> list[float]:
        logged = trainer.validate(module, [loader_of(training), loader_of(held_out)], verbose=False)
        return [next(iter(metrics.values())) ** 0.5 for metrics in logged]

    before = errors()
    trainer.fit(module, loader_of(training, shuffle=True), loader_of(held_out))
    return before, errors()


def model_for(training: Sequence[Ligand]) -> SchNet:
    """Return a small SchNet that predicts about the mean of the training ligands before training."""
    measured = torch.cat([ligand.free_energy for ligand in training])
    mean, deviation = measured.mean().item(), measured.std().item()
    return SchNet(32, 32, 3, 25, CUTOFF, radius_graph, readout="mean", mean=mean, std=deviation)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Groups of conformers in Lightning.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--molecules", type=int, default=72, help="number; every fourth is held out")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training molecules")
    parser.add_argument("--precision", default="32-true", help="as in Lightning: 64-true, bf16-mixed, ...")
    parser.add_argument("--accelerator", default="cpu", help="as in Lightning: cpu, gpu, auto, ...")
    cache = Path(__file__).parents[1] / ".cache" / "conformers"
    parser.add_argument("--cache", type=Path, default=cache, help="stores the conformers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the errors before and after."""
    options = parse_arguments(argv)
    pl.seed_everything(0)
    halves = split(sulfonamides(), options.molecules, seed=0)
    training, held_out = (list(load_ligands(half, POSES, 0, options.cache, torch.device("cpu"))) for half in halves)
    schnet = model_for(training)
    scorer = gradhooks.MultiPose(schnet, "boltzmann", collate=collate_molecules)
    before, after = train(
        scorer,
        training,
        held_out,
        max_epochs=options.epochs,
        precision=options.precision,
        accelerator=options.accelerator,
        gradient_clip_val=10.0,
    )
    rows = [["before", *before], ["after", *after]]
    print(tabulate(rows, ["RMSE, kcal/mol", "training", "held out"], tablefmt="pipe", floatfmt=".3f"))


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for a network this small
    main()

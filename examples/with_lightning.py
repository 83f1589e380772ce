"""SchNet on groups of conformers, in a Lightning Trainer: an ordinary module, an ordinary `training_step`.

    python examples/with_lightning.py                            # half a minute on one core
    python examples/with_lightning.py --precision bf16-mixed
    python examples/with_lightning.py --accelerator gpu

A batch is one ligand, that is one group of poses; `accumulate_grad_batches` makes a step of the optimizer of four. The
data comes with the rdkit wheel; nothing is downloaded.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from binding_affinity import CUTOFF, radius_graph
from conformers import Ligand, ligands, split, sulfonamides
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_geometric.nn import SchNet

import gradhooks
from gradhooks.profiling import table

POSES = 4
LEARNING_RATE = 5e-3


class BindingAffinity(pl.LightningModule):
    """Learns free energies; whether `scorer` keeps one graph or all of them makes no difference to it."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def squared_error(self, ligand: Ligand) -> Tensor:
        """Of the predicted free energy, in (kcal/mol)^2."""
        square: Tensor = (self.scorer(ligand.poses).combined - ligand.free_energy).square().mean()
        return square

    def training_step(self, ligand: Ligand, _: int) -> Tensor:
        """The loss, as ever."""
        return self.squared_error(ligand)

    def validation_step(self, ligand: Ligand, _: int, dataloader_idx: int = 0) -> None:
        """The mean over each loader is logged."""
        del dataloader_idx
        self.log("squared error", self.squared_error(ligand), batch_size=1)

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam, which slows down to a stop."""
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def one_by_one(some: Sequence[Ligand], *, shuffle: bool = False) -> DataLoader[Ligand]:
    """A loader whose batches are ligands, that is groups."""
    # As they are: the collate function that a loader has by default would make lists of tuples, as poses are.
    return DataLoader(some, batch_size=None, shuffle=shuffle, collate_fn=lambda ligand: ligand)


def train(
    scorer: nn.Module, training: Sequence[Ligand], held_out: Sequence[Ligand], **options: Any
) -> tuple[list[float], list[float]]:
    """Errors (RMSE) for the training and the held-out ligands, before and after; `options` are of `pl.Trainer`."""
    module = BindingAffinity(scorer)
    trainer = pl.Trainer(devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False, **options)

    def errors() -> list[float]:
        found = trainer.validate(module, [one_by_one(training), one_by_one(held_out)], verbose=False)
        return [next(iter(of_loader.values())) ** 0.5 for of_loader in found]

    before = errors()
    trainer.fit(module, one_by_one(training, shuffle=True), one_by_one(held_out))
    return before, errors()


def model_for(training: Sequence[Ligand]) -> SchNet:
    """A small SchNet, which predicts about the mean of the training ligands before it is trained."""
    measured = torch.cat([ligand.free_energy for ligand in training])
    mean, deviation = measured.mean().item(), measured.std().item()
    return SchNet(32, 32, 3, 25, CUTOFF, radius_graph, readout="mean", mean=mean, std=deviation)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Groups of conformers in Lightning.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--molecules", type=int, default=72, help="how many; every fourth is held out")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training molecules")
    parser.add_argument("--precision", default="32-true", help="of Lightning: 64-true, bf16-mixed, ...")
    parser.add_argument("--accelerator", default="cpu", help="of Lightning: cpu, gpu, auto, ...")
    cache = Path(__file__).parents[1] / ".cache" / "conformers"
    parser.add_argument("--cache", type=Path, default=cache, help="keeps the conformers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the errors beside those of predicting the mean."""
    options = arguments(argv)
    pl.seed_everything(0)
    halves = split(sulfonamides(), options.molecules, seed=0)
    training, held_out = (list(ligands(half, POSES, 0, options.cache, torch.device("cpu"))) for half in halves)
    schnet = model_for(training)
    scorer = gradhooks.MultiPose(schnet, "boltzmann")  # the one line
    before, after = train(
        scorer,
        training,
        held_out,
        max_epochs=options.epochs,
        precision=options.precision,
        accelerator=options.accelerator,
        accumulate_grad_batches=4,
        gradient_clip_val=10.0,
    )
    rows = [[name, *(f"{error:.3f}" for error in errors)] for name, errors in (("before", before), ("after", after))]
    print(table(["RMSE, kcal/mol", "training", "held out"], rows))


if __name__ == "__main__":
    torch.set_num_threads(1)  # of so small a network more threads are slower
    main()

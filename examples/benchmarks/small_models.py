"""Small models, whose poses are cheap beside Python, and batches of groups for them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks import Combination
from gradhooks.combinations import Boltzmann, Mean, Min
from gradhooks.engine.nested import map_tensors
from gradhooks.profiling.training_batch import TrainingBatch

CUTOFF = 5.0
Molecule = tuple[Tensor, Tensor]


def collate_molecules(poses: list[Molecule]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of SchNet for several poses: all atoms, and the number of the pose of each atom."""
    numbers, positions = zip(*poses, strict=True)
    atoms = torch.tensor([len(pose) for pose in numbers], device=numbers[0].device)
    batch = torch.arange(len(poses), device=atoms.device).repeat_interleave(atoms)
    return torch.cat(numbers), torch.cat(positions), batch


def neighbours(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the edges `(2, E)` between atoms of a pose closer than the cutoff, and their lengths `(E,)`."""
    atoms = batch.bincount()
    first = atoms.cumsum(0) - atoms
    place = torch.arange(len(batch), device=batch.device) - first[batch]
    # The poses side by side; what is left of a row is so far away that nothing is close to it.
    table = positions.new_full((len(atoms), int(atoms.max()), 3), torch.inf).index_put((batch, place), positions)
    distances = torch.cdist(table, table, compute_mode="donot_use_mm_for_euclid_dist")
    pose, row, column = ((distances < CUTOFF) & (distances > 0)).nonzero().T
    return torch.stack([first[pose] + row, first[pose] + column]), distances[pose, row, column]


def schnet() -> tuple[nn.Module, Callable[[int], list[Molecule]], Any]:
    """Return a small SchNet of PyTorch Geometric, a function that makes poses of 20 to 60 atoms, and their collate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it uses functions that newer releases of torch deprecate
        from torch_geometric.nn.models import SchNet  # noqa: PLC0415 - optional

    def poses(count: int) -> list[Molecule]:
        atoms = torch.randint(20, 61, (count,)).tolist()
        return [(torch.randint(1, 10, (size,)), 2.0 * size ** (1 / 3) * torch.rand(size, 3)) for size in atoms]

    model = SchNet(32, 32, num_interactions=3, num_gaussians=25, cutoff=CUTOFF, interaction_graph=neighbours)
    return model, poses, collate_molecules


def mlp() -> tuple[nn.Module, Callable[[int], Tensor], Any]:
    """Return an MLP of three layers, and a function that makes stacked poses."""
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    return model, lambda count: torch.randn(count, 64), None


SMALL_MODELS = {"mlp": mlp, "schnet": schnet}
COMBINATIONS: dict[str, Callable[[float], Combination]] = {
    "mean": lambda _: Mean(),
    "boltzmann": Boltzmann,
    "min, scale 1000": lambda spread: Min(1000 / spread),
}


def batch_of(
    name: str, combination: str, group_size: int, groups: int, device: torch.device | str = "cpu"
) -> TrainingBatch:
    """Return a model and a batch of groups, with a fixed seed; temperature and scale fit the spread of predictions."""
    torch.manual_seed(0)
    model, make_poses, collate = SMALL_MODELS[name]()
    model.to(device)
    poses = map_tensors(lambda tensor: tensor.to(device), make_poses(group_size * groups))
    some = TrainingBatch(model, poses, "mean", collate=collate)
    with torch.no_grad():
        spread = some.run(0, min(32, len(some.inputs))).std().item()
    index = torch.arange(groups).repeat_interleave(group_size) if groups > 1 else None
    return TrainingBatch(model, poses, COMBINATIONS[combination](spread), index, collate=collate)

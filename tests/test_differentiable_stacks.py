"""Gradients flow through stacked, collated and repeated poses into the tensors from which they are computed."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import TensorFactory, mlp
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_both,
)

import gradhooks
from gradhooks.testing import full_graph

COUNT = 5


class Scorer(nn.Module):
    """Scores one pose or a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 6, 1)

    def forward(self, pocket: Tensor, ligand: Tensor) -> Tensor:
        return self.net(torch.cat([pocket, ligand], -1))


STACKED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mapping": lambda pockets, ligands: {"pocket": pockets, "ligand": ligands},
    "mapping with one part that requires grad": lambda pockets, ligands: {
        "pocket": pockets,
        "ligand": ligands.detach(),
    },
    "mapping, one tensor under two names": lambda pockets, _: {"pocket": pockets, "ligand": pockets},
    "ordered mapping": lambda pockets, ligands: OrderedDict(ligand=ligands, pocket=pockets),
    "tensor": lambda pockets, ligands: torch.cat([pockets, ligands], 1),
}


def train_stack(factory: TensorFactory, stacked: str, accumulator: str | None, size: int = 1) -> Gradients:
    """Train a stacked group, or if `accumulator` is None one batched forward, and return all gradients."""
    manual_seed(7)
    encoder, scorer = (module.to(factory.device, factory.dtype) for module in (mlp(5, 6, 4), Scorer()))
    leaf, ligands = factory.randn(COUNT, 5).requires_grad_(), factory.randn(COUNT, 4).requires_grad_()
    pockets = encoder(leaf)
    encoding_gradients: list[Tensor] = []
    pockets.register_hook(encoding_gradients.append)
    stack = STACKED[stacked](pockets, ligands)
    combination = COMBINATIONS["boltzmann learnable"]()
    model = scorer.net if isinstance(stack, Tensor) else scorer
    if accumulator is None:
        rows = model(stack) if isinstance(stack, Tensor) else model(**stack)
        loss_on_both(gradhooks.MultiPosePrediction(combination(rows), rows)).backward()
    else:
        multi_pose = gradhooks.MultiPose(model, combination, accumulator=accumulator, chunk_size=size)
        loss_on_both(multi_pose(stack)).backward()
    assert len(encoding_gradients) == 1
    everything = {**dict(encoder.named_parameters()), **dict(scorer.named_parameters(prefix="scorer"))}
    return gradients_of({**everything, "leaf": leaf, "ligands": ligands, **dict(combination.named_parameters())})


@pytest.mark.parametrize("stacked", STACKED)
def test_stacks_that_require_grad(stacked: str, double: TensorFactory) -> None:
    expected = train_stack(double, stacked, None)
    for accumulator in CONCRETE_ACCUMULATORS:
        for size in (1, 2, 3, COUNT + 1):
            with case_label(accumulator, size):
                assert_same_gradients(train_stack(double, stacked, accumulator, size), expected)


def test_collated_poses_that_require_grad(double: TensorFactory) -> None:
    def train_collated(accumulator: str | None, size: int = 1) -> Gradients:
        manual_seed(7)
        modules = nn.ModuleList([mlp(5, 6, 4), mlp(8, 6, 1)]).to(double.device, double.dtype)
        encoder, model = modules
        encoding = encoder(double.randn(5))
        ligands = [double.randn(4).requires_grad_() for _ in range(COUNT)]
        poses = [torch.cat([encoding, ligand]) for ligand in ligands]
        if accumulator is None:
            loss_on_both(full_graph(model, poses, gradhooks.combinations.Boltzmann())).backward()
        else:
            options: dict[str, Any] = {"chunk_size": size, "collate": torch.stack}
            scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, **options)
            loss_on_both(scorer(poses)).backward()
        return gradients_of({**dict(modules.named_parameters()), **{f"{i}": x for i, x in enumerate(ligands)}})

    expected = train_collated(None)
    for accumulator in CONCRETE_ACCUMULATORS:
        for size in (1, 2, COUNT):
            with case_label(accumulator, size):
                assert_same_gradients(train_collated(accumulator, size), expected)


def test_the_same_pose_twice(double: TensorFactory) -> None:
    def train_repeated(accumulator: str | None) -> Gradients:
        manual_seed(7)
        model, leaf = mlp(4, 6, 1).to(double.device, double.dtype), double.randn(4).requires_grad_()
        poses = [leaf, double.randn(4), leaf, leaf[:], leaf * 2]
        if accumulator is None:
            loss_on_both(full_graph(model, poses, gradhooks.combinations.Boltzmann())).backward()
        else:
            loss_on_both(gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)(poses)).backward()
        return gradients_of({**dict(model.named_parameters()), "leaf": leaf})

    expected = train_repeated(None)
    for accumulator in ACCUMULATORS:
        with case_label(accumulator):
            assert_same_gradients(train_repeated(accumulator), expected)

"""Reference models of the benchmark: what the figures in the README were measured on."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Reference = tuple[nn.Module, Callable[[int], Any]]


class _Encoder(nn.Module):
    """Transformer encoder, 6 layers of width 256, one number for a sequence of shape `(tokens, 256)`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.readout = nn.Linear(256, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(tokens.unsqueeze(0))
        prediction: Tensor = self.readout(hidden.mean(1))
        return prediction


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.first_norm(self.first(image)).relu()
        total: Tensor = self.second_norm(self.second(hidden)) + self.shortcut(image)
        return total.relu()


def transformer() -> Reference:
    """A transformer encoder on 256 tokens."""
    return _Encoder(), lambda seed: torch.randn(256, 256, generator=_seeded(seed))


def resnet() -> Reference:
    """A small residual net on images of 64 x 64, in eval mode, as pathologists fine-tune them."""
    blocks = [_Block(32, 32, 1), _Block(32, 64, 2), _Block(64, 128, 2)]
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1))
    return model.eval(), lambda seed: torch.randn(1, 3, 64, 64, generator=_seeded(seed))


def schnet() -> Reference:
    """An unmodified SchNet of PyTorch Geometric on 300 atoms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import uses what newer releases of torch deprecate
        from torch_geometric.nn.models import SchNet  # noqa: PLC0415 - optional

    atoms, cutoff = 300, 5.0

    def neighbours(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        del batch  # one molecule
        distances = torch.cdist(positions, positions)
        edges = ((distances < cutoff) & (distances > 0)).nonzero().T
        return edges, distances[edges[0], edges[1]]

    def pose(seed: int) -> tuple[Tensor, Tensor]:
        generator = _seeded(seed)
        numbers = torch.randint(1, 10, (atoms,), generator=generator)
        return numbers, 1.8 * atoms ** (1 / 3) * torch.rand(atoms, 3, generator=generator)

    model = SchNet(64, 64, num_interactions=3, num_gaussians=25, cutoff=cutoff, interaction_graph=neighbours)
    return model, pose


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


REFERENCES: dict[str, Callable[[], Reference]] = {"schnet": schnet, "transformer": transformer, "resnet": resnet}

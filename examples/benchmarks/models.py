"""The reference models of the benchmarks, and groups of poses for them."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradhooks
from gradhooks.engine.nested import map_tensors

MakePose = Callable[[int], Any]


class _Encoder(nn.Module):
    """A transformer encoder, 6 layers of width 256; one number for a sequence of shape `(tokens, 256)`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.readout = nn.Linear(256, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(tokens.unsqueeze(0))
        prediction: Tensor = self.readout(hidden.mean(1))
        return prediction


class _ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(channels_out), nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.first_norm(self.first(image)).relu()
        output: Tensor = self.second_norm(self.second(hidden)) + self.shortcut(image)
        return output.relu()


def transformer() -> tuple[nn.Module, MakePose]:
    """Return a transformer encoder and sequences of 256 tokens."""
    return _Encoder(), lambda seed: torch.randn(256, 256, generator=_generator(seed))


def resnet() -> tuple[nn.Module, MakePose]:
    """Return a small residual net and images of 64 x 64; in eval mode, as in fine-tuning on pathology slides."""
    blocks = [_ResidualBlock(32, 32, 1), _ResidualBlock(32, 64, 2), _ResidualBlock(64, 128, 2)]
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1))
    return model.eval(), lambda seed: torch.randn(1, 3, 64, 64, generator=_generator(seed))


def schnet() -> tuple[nn.Module, MakePose]:
    """Return an unmodified SchNet of PyTorch Geometric and conformations of 300 atoms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it uses functions that newer releases of torch deprecate
        from torch_geometric.nn.models import SchNet  # noqa: PLC0415 - optional

    atoms, cutoff = 300, 5.0

    def neighbours(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        del batch  # one molecule
        distances = torch.cdist(positions, positions)
        edges = ((distances < cutoff) & (distances > 0)).nonzero().T
        return edges, distances[edges[0], edges[1]]

    def pose(seed: int) -> tuple[Tensor, Tensor]:
        generator = _generator(seed)
        numbers = torch.randint(1, 10, (atoms,), generator=generator)
        return numbers, 1.8 * atoms ** (1 / 3) * torch.rand(atoms, 3, generator=generator)

    model = SchNet(64, 64, num_interactions=3, num_gaussians=25, cutoff=cutoff, interaction_graph=neighbours)
    return model, pose


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


REFERENCE_MODELS: dict[str, Callable[[], tuple[nn.Module, MakePose]]] = {
    "schnet": schnet,
    "transformer": transformer,
    "resnet": resnet,
}


class Reference(NamedTuple):
    """A reference model on a device, a group of poses, and the standard deviation of the predictions."""

    model: nn.Module
    poses: list[Any]
    spread: float


def reference(name: str, count: int, device: torch.device | str) -> Reference:
    """Create a reference model and `count` poses, with a fixed seed."""
    torch.manual_seed(0)
    model, make_pose = REFERENCE_MODELS[name]()
    model.to(device)
    poses = [map_tensors(lambda tensor: tensor.to(device), make_pose(seed)) for seed in range(count)]
    with torch.no_grad():
        predictions = gradhooks.MultiPose(model)(poses[:32]).per_pose
    return Reference(model, poses, predictions.std().item())

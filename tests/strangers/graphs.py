"""Strangers from PyTorch Geometric and e3nn: networks on graphs and on atoms in space."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from strangers.entry import Stranger, stranger


def radius_graph(positions: Tensor, r: float, **_: Any) -> Tensor:
    """Return the edges shorter than `r`, shape `(2, edges)`, by target: as torch_cluster, which is compiled code."""
    distances = torch.cdist(positions, positions)
    return ((distances < r) & ~torch.eye(len(positions), dtype=torch.bool)).nonzero().flip(1).T


def triplets(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
    """Return the triplets k -> j -> i of a graph; that of DimeNet without torch_sparse."""
    del num_nodes
    source, target = edge_index
    second, first = ((target[None] == source[:, None]) & (source[None] != target[:, None])).nonzero().T
    return target, source, target[second], source[second], source[first], first, second


def graph_poses(width: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, width), radius_graph(torch.randn(n, 3), 1.8)) for n in (5, 7, 6, 8)]


def atom_poses() -> list[dict[str, Tensor]]:
    return [{"z": torch.randint(1, 9, (n,)), "pos": 1.5 * torch.randn(n, 3)} for n in (4, 5, 6, 5)]


def sum_over_nodes(model: nn.Module, pose: tuple[Tensor, Tensor]) -> Tensor:
    return model(*pose).sum(0)


def energy(model: nn.Module, pose: dict[str, Tensor]) -> Tensor:
    return model(pose["z"], pose["pos"]).flatten()


def _basic(name: str, **options: Any) -> Callable[[], Stranger]:
    def build() -> Stranger:
        from torch_geometric.nn import models  # noqa: PLC0415 - optional

        return Stranger(getattr(models, name)(6, 8, 2, 1, **options), graph_poses(), sum_over_nodes)

    build.__name__ = name
    return build


for _name, _options in {
    "GCN": {"dropout": 0.2, "norm": "BatchNorm"},
    "GIN": {"norm": "GraphNorm"},
    "GAT": {"heads": 2, "v2": True, "dropout": 0.2},
    "GraphSAGE": {"aggr": "lstm", "norm": "LayerNorm"},
    "EdgeCNN": {"jk": "lstm"},
    "PNA": {"aggregators": ["mean", "std", "max"], "scalers": ["identity", "attenuation"], "deg": torch.ones(9).long()},
}.items():
    stranger("torch_geometric", quick=_name == "GCN")(_basic(_name, **_options))


@stranger("torch_geometric")
def GraphUNet() -> Stranger:  # noqa: N802 - the name of the model
    from torch_geometric.nn import models  # noqa: PLC0415

    return Stranger(models.GraphUNet(6, 8, 1, depth=2), graph_poses(), sum_over_nodes)


@stranger("torch_geometric")
def AttentiveFP() -> Stranger:  # noqa: N802
    from torch_geometric.nn import models  # noqa: PLC0415

    poses = [(*pose, torch.randn(pose[1].shape[1], 3), torch.zeros(len(pose[0])).long()) for pose in graph_poses()]
    return Stranger(models.AttentiveFP(6, 8, 1, 3, 2, 2, 0.1), poses, lambda model, pose: model(*pose)[0])


@stranger("torch_geometric")
def GraphTransformer() -> Stranger:  # noqa: N802
    from torch_geometric import nn as layers  # noqa: PLC0415

    model = layers.Sequential("x, edges", [
        (layers.GPSConv(6, layers.GINConv(nn.Linear(6, 6)), heads=2, dropout=0.1), "x, edges -> x"),
        nn.Linear(6, 1),
    ])  # fmt: skip
    return Stranger(model, graph_poses(), sum_over_nodes)


@stranger("torch_geometric", quick=True)
def SchNet() -> Stranger:  # noqa: N802
    from torch_geometric.nn import models  # noqa: PLC0415

    def interactions(positions: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        edges = radius_graph(positions, 5.0)
        return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)

    model = models.SchNet(8, 8, 2, 6, 5.0, interaction_graph=interactions)
    return Stranger(model, atom_poses(), energy)


def _with_dense_graphs(module: Any) -> None:
    module.radius_graph = radius_graph
    if hasattr(module, "triplets"):
        module.triplets = triplets


@stranger("torch_geometric")
def DimeNetPlusPlus() -> Stranger:  # noqa: N802
    from torch_geometric.nn.models import dimenet  # noqa: PLC0415

    _with_dense_graphs(dimenet)
    model = dimenet.DimeNetPlusPlus(8, 1, 2, 4, 4, 8, 3, 3, output_initializer="glorot_orthogonal")
    return Stranger(model, atom_poses(), energy)


@stranger("torch_geometric")
def ViSNet() -> Stranger:  # noqa: N802
    from torch_geometric.nn.models import visnet  # noqa: PLC0415

    def dense(positions: Tensor, r: float, loop: bool = False, **_: Any) -> Tensor:
        edges = radius_graph(positions, r)
        return torch.cat([edges, torch.arange(len(positions)).expand(2, -1)], 1) if loop else edges

    visnet.radius_graph = dense
    model = visnet.ViSNet(num_layers=2, hidden_channels=8, num_heads=2, num_rbf=4, derivative=True)

    def force_and_energy(model: nn.Module, pose: dict[str, Tensor]) -> Tensor:
        batch = torch.zeros(len(pose["z"]), dtype=torch.long)
        energies, forces = model(pose["z"], pose["pos"].clone(), batch)
        return energies.flatten()[:1] + forces.square().sum()

    return Stranger(model, atom_poses(), force_and_energy)


@stranger("e3nn")
def e3nn_network() -> Stranger:
    from e3nn.nn.models.v2106.gate_points_networks import SimpleNetwork  # noqa: PLC0415

    model = SimpleNetwork("4x0e", "1x0e", 3.0, 3.0, 5.0, mul=4, layers=1, lmax=1)
    poses = [{"pos": torch.randn(n, 3), "x": torch.randn(n, 4)} for n in (4, 5, 6, 5)]
    return Stranger(model, poses, lambda model, pose: model(pose)[0])


@stranger("torch_geometric", quick=True, refusal="holds a tensor with a graph")
def SuperGAT() -> Stranger:  # noqa: N802
    """It draws edges at random, and keeps what its own loss needs, with a graph, in attributes."""
    from torch_geometric import nn as layers  # noqa: PLC0415

    model = layers.SuperGATConv(6, 1, attention_type="MX", edge_sample_ratio=0.8, is_undirected=True)
    return Stranger(model.train(), graph_poses(), sum_over_nodes)


class Quantized(nn.Module):
    """Sums what a quantizer returns: vectors, indices, and the loss that trains its codebook."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.first, self.quantizer = nn.Linear(6, 6), quantizer

    def forward(self, nodes: Tensor, _: Tensor) -> Tensor:
        vectors, _, loss = self.quantizer(self.first(nodes)[None])
        return vectors.sum(1)[:, :1] + loss.sum()


@stranger("vector_quantize_pytorch", refusal="which gradhooks cannot intercept")
def vector_quantizer() -> Stranger:
    """Its codebook is a moving average, and its loss starts as a buffer that it makes require grad in the forward."""
    from vector_quantize_pytorch import VectorQuantize  # noqa: PLC0415 - optional

    model = Quantized(VectorQuantize(dim=6, codebook_size=4, decay=0.8))
    return Stranger(model.train(), graph_poses(), lambda model, pose: model(*pose)[0])

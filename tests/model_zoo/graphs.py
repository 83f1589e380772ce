"""Graph networks of PyTorch Geometric, with its data objects as poses."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, model_case

ATOMS = 4


def import_torch_geometric() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses deprecated parts of torch
        data = pytest.importorskip("torch_geometric.data")
        layers = pytest.importorskip("torch_geometric.nn")
    return data, layers


def all_edges(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Connect every pair of atoms, without the compiled neighbour search."""
    pairs = (batch.unsqueeze(0) == batch.unsqueeze(1)) & ~torch.eye(len(batch), dtype=torch.bool, device=batch.device)
    edges = pairs.nonzero().t()
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=1)


@model_case(bit_for_bit=False)
def schnet(factory: TensorFactory) -> ModelCase:
    data, layers = import_torch_geometric()
    model = layers.SchNet(8, 8, 2, 5, interaction_graph=all_edges)
    elements, positions = torch.randint(1, 9, (ATOMS,)).to(factory.device), factory.randn(MOST_POSES, ATOMS, 3) * 2
    return ModelCase(
        model,
        lambda count: [data.Data(z=elements, pos=rows.clone()) for rows in positions[:count]],
        call=lambda model, pose: model(pose.z, pose.pos),
    )


class GraphAttention(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.first = layers.GATConv(4, 4, heads=2)
        self.second = layers.GATConv(8, 1)

    def forward(self, graph: Any) -> Tensor:
        return self.second(self.first(graph.x, graph.edge_index).tanh(), graph.edge_index).mean(0)


@model_case(bit_for_bit=False)
def graph_attention_with_learnable_nodes(factory: TensorFactory) -> ModelCase:
    data, layers = import_torch_geometric()
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]], device=factory.device)
    nodes = [factory.randn(ATOMS, 4).requires_grad_() for _ in range(MOST_POSES)]
    return ModelCase(
        GraphAttention(layers),
        lambda count: [data.Data(x=rows, edge_index=edges) for rows in nodes[:count]],
        outside={f"nodes {i}": rows for i, rows in enumerate(nodes)},
    )

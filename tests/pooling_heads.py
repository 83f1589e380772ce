"""Pooling modules of torchmil and PyTorch Geometric, and how each is called without gradhooks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

FEATURES = 6
INDEX = [2, 0, 1, 0, 2, 0, 2, 2, 1]
"""Ragged, unsorted groups of 3, 2 and 4 poses."""


class Head(NamedTuple):
    """A pooling module.

    Attributes:
        make: Returns the module.
        arguments: Of every call.
        together: Whether a batch of groups is one call.
    """

    make: Callable[[], nn.Module]
    arguments: dict[str, Any]
    together: bool = True


def torchmil_heads() -> dict[str, Head]:
    models = pytest.importorskip("torchmil.models", reason="torchmil is missing; pip install -e '.[examples]'")
    shape, attention = (FEATURES,), {"return_att": True}
    return {
        "ABMIL": Head(lambda: models.ABMIL(shape, att_dim=4, gated=True), attention),
        "DSMIL": Head(lambda: models.DSMIL(shape, att_dim=4), {**attention, "return_inst_pred": True}),
        "TransMIL": Head(lambda: models.TransMIL(shape, att_dim=8, n_heads=2), attention, together=False),
        "CLAM": Head(lambda: models.CLAM_SB(shape, att_dim=4), attention),
        # Shuffles the poses by numpy, so that what a group gets depends on when it is combined.
        "DTFD-MIL": Head(lambda: models.DTFDMIL(shape, att_dim=4, n_groups=2), {"return_inst_cam": True}, False),
    }


def aggregations() -> dict[str, Head]:
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    makers: dict[str, Callable[[], nn.Module]] = {
        "mean": aggr.MeanAggregation,
        "softmax": lambda: aggr.SoftmaxAggregation(learn=True, channels=FEATURES),
        "power mean": lambda: aggr.PowerMeanAggregation(learn=True, channels=FEATURES),
        "attentional": lambda: aggr.AttentionalAggregation(nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 3)),
        "DeepSets": lambda: aggr.DeepSetsAggregation(nn.Linear(FEATURES, 4), nn.Linear(4, 2)),
        "multi": lambda: aggr.MultiAggregation(["mean", "max", "std"]),
        "set transformer": lambda: aggr.SetTransformerAggregation(FEATURES, heads=2, layer_norm=True),
        "median": aggr.MedianAggregation,
    }
    heads = {name: Head(make, {}) for name, make in makers.items()}
    # Reads the padding of the shorter groups.
    return {**heads, "LSTM": Head(lambda: aggr.LSTMAggregation(FEATURES, 3), {}, together=False)}


def call_bag(module: nn.Module, arguments: dict[str, Any], rows: Tensor) -> tuple[Tensor, ...]:
    """Call a module of torchmil for one bag, shape `(N, features)`; its output is returned without the first axis."""
    mask = {} if "TransMIL" in type(module).__name__ else {"mask": torch.ones(1, len(rows), device=rows.device)}
    return tuple(part[0] for part in module(rows.unsqueeze(0), **mask, **arguments))


def call_set(module: nn.Module, arguments: dict[str, Any], rows: Tensor) -> tuple[Tensor, ...]:
    """Call an aggregation of PyTorch Geometric for one set, shape `(N, features)`."""
    index = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return (module(rows, index, dim_size=1, **arguments)[0],)


def manual_seeds() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the generator that torchmil uses

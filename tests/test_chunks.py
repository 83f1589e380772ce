"""Groups in chunks of any size give the gradients of the full graph."""

import functools
from typing import Any

import pytest
import torch
from model_state import unchanged
from model_zoo import TensorFactory, build
from model_zoo.graphs import all_edges, import_torch_geometric
from pose_forms import COUNT, FORMS, assert_gradients_of_full_graph, make_model, random_rows
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS_AND_PLAIN,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_both,
    options_of,
    train_full_graph,
    train_multi_pose,
)

from gradhooks import MultiPose
from gradhooks.errors import PosesError
from gradhooks.testing import full_graph

SIZES: list[Any] = [1, 2, 3, COUNT, COUNT + 1, None]


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
@pytest.mark.parametrize("form", ["generator", "dataset", "stacked tensor", "mapping of stacked tensors"])
def test_chunks(form: str, accumulator: str, double: TensorFactory) -> None:
    for size in SIZES:
        model = make_model(double)
        collate = None if "stacked" in form else torch.stack
        scorer = MultiPose(model, "boltzmann", chunk_size=size, collate=collate, **options_of(accumulator))
        prediction = scorer(FORMS[form](*random_rows(double)))
        assert (prediction.combined.shape, prediction.per_pose.shape) == ((1,), (COUNT, 1)), size
        loss_on_both(prediction).backward()
        with case_label(size):
            assert_gradients_of_full_graph(model, double)
        # None takes as many as fit: one without memory, else all after the first, which is measured.
        chosen = 2 if accumulator == "plain" else COUNT
        expected_chunks = chosen if size is None else -(-COUNT // size)
        assert (scorer.report.poses, scorer.report.chunks) == (COUNT, expected_chunks), size


def test_collate_with_stacked_poses_is_refused(double: TensorFactory) -> None:
    model = make_model(double)
    x, shift = random_rows(double)
    for stack in (x, {"x": x, "shift": shift}):
        with unchanged(model), pytest.raises(PosesError, match=r"already stacked in .* pass a list of poses"):
            MultiPose(model, collate=torch.stack)(stack)


def test_a_list_in_chunks_needs_collate(double: TensorFactory) -> None:
    model, poses = make_model(double), double.randn(COUNT, 4)
    for group in (list(poses), iter(poses)):
        with unchanged(model), pytest.raises(PosesError, match="need collate="):
            MultiPose(model, chunk_size=2)(group)
    scorer = MultiPose(model)
    scorer(list(poses))
    assert scorer.report.chunks == COUNT  # without it they run one by one


@pytest.mark.parametrize("accumulator", ACCUMULATORS_AND_PLAIN)
def test_the_model_gets_chunks_of_the_chosen_size(accumulator: str, double: TensorFactory) -> None:
    model, sizes = make_model(double), list[tuple[int, bool]]()

    def call(model: nn.Module, chunk: Tensor) -> Tensor:
        sizes.append((len(chunk), torch.is_grad_enabled()))
        return model(chunk)

    scorer = MultiPose(model, "boltzmann", call=call, chunk_size=2, audit=False, **options_of(accumulator))
    scorer(torch.add(*random_rows(double, 11))).combined.sum().backward()
    if accumulator in {"stream", "store", "plain"}:
        assert sizes == [(2, True)] * 5 + [(1, True)]
    else:
        assert sizes[:6] == [(2, True), *[(2, False)] * 4, (1, False)]
        assert all(with_graph for _, with_graph in sizes[6:])
    sizes.clear()
    with torch.no_grad():
        scorer(torch.add(*random_rows(double, 11)))
    assert sizes == [(2, False)] * 5 + [(1, False)]


def test_chunks_of_several_outputs(double: TensorFactory) -> None:
    expected = train_full_graph(build("vector_output", double), COMBINATIONS["boltzmann"], loss_on_both, COUNT)
    for accumulator in CONCRETE_ACCUMULATORS:
        for size in (1, 2, 3, COUNT):
            result = train_multi_pose(
                build("vector_output", double),
                COMBINATIONS["boltzmann"],
                loss_on_both,
                COUNT,
                accumulator,
                chunk_size=size,
                collate=torch.stack,
            )
            with case_label(accumulator, size):
                assert_same_gradients(result.gradients, expected.gradients)


# -- graphs of PyTorch Geometric ------------------------------------------------------------------------------------


def schnet(factory: TensorFactory) -> tuple[nn.Module, list[Any]]:
    data, layers = import_torch_geometric()
    manual_seed(7)
    model = layers.SchNet(8, 8, 2, 5, interaction_graph=all_edges).to(factory.device, factory.dtype)
    sizes = (4, 3, 5, 4, 2)
    return model, [
        data.Data(z=factory.randint(8, size) + 1, pos=factory.randn(size, 3).requires_grad_() * 2) for size in sizes
    ]


def mark_positions(graphs: list[Any]) -> dict[str, Tensor]:
    """Make the positions leaves that require grad, and return them by name."""
    for graph in graphs:
        graph.pos = graph.pos.detach().requires_grad_()
    return {f"positions {i}": graph.pos for i, graph in enumerate(graphs)}


@functools.cache
def graph_gradients(factory: TensorFactory) -> Gradients:
    model, graphs = schnet(factory)
    leaves = {**dict(model.named_parameters()), **mark_positions(graphs)}
    combination = COMBINATIONS["boltzmann"]()
    prediction = full_graph(model, graphs, combination, call=lambda model, graph: model(graph.z, graph.pos).squeeze(0))
    loss_on_both(prediction).backward()
    return gradients_of(leaves)


@pytest.mark.parametrize("accumulator", [*CONCRETE_ACCUMULATORS, "plain"])
def test_batches_of_graphs(accumulator: str, double: TensorFactory) -> None:
    data, _ = import_torch_geometric()
    for size in SIZES:
        model, graphs = schnet(double)
        leaves = {**dict(model.named_parameters()), **mark_positions(graphs)}
        scorer = MultiPose(
            model,
            "boltzmann",
            chunk_size=size,
            collate=data.Batch.from_data_list,
            call=lambda model, batch: model(batch.z, batch.pos, batch.batch.to(batch.pos.device)),
            **options_of(accumulator),
        )
        prediction = scorer(graphs)
        assert (prediction.combined.shape, prediction.per_pose.shape) == ((1,), (COUNT, 1)), size
        loss_on_both(prediction).backward()
        with case_label(size):
            assert_same_gradients(gradients_of(leaves), graph_gradients(double))


def test_a_batch_of_graphs_is_refused(double: TensorFactory) -> None:
    data, _ = import_torch_geometric()
    model, graphs = schnet(double)
    batch = data.Batch.from_data_list(graphs)
    with unchanged(model), pytest.raises(PosesError, match=r"one .*Batch; pass a list of poses .*to_data_list"):
        MultiPose(model)(batch)
    with unchanged(model), pytest.raises(PosesError, match=r"one Data; pass a list of poses"):
        MultiPose(model)(graphs[0])
    scorer = MultiPose(model, "mean", call=lambda model, graph: model(graph.z, graph.pos))
    assert scorer(batch.to_data_list()).per_pose.shape == (COUNT, 1, 1)

"""Poses in any form, in chunks of any size, and predictions of any shape."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from model_state import untouched
from model_zoo import Place, Specimen, build, mlp
from model_zoo.graphs import all_edges, geometric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    assert_same_gradients,
    gradients_of,
    of_both,
    train_by_full_graph,
    train_by_group,
)

from gradhooks import MultiPose
from gradhooks.errors import PosesError, PredictionError
from gradhooks.testing import full_graph

COUNT = 5


class Sum(nn.Module):
    """Takes its parts by place or by name, single or in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return self.net(x + shift)


@dataclass
class Pose:
    x: Tensor
    shift: Tensor


class DataSet:
    """What a `torch.utils.data.Dataset` offers: neither a sequence nor an iterator."""

    def __init__(self, poses: list[Any]) -> None:
        self.poses = poses

    def __getitem__(self, place: int) -> Any:
        return self.poses[place]

    def __len__(self) -> int:
        return len(self.poses)


class OwnTensors(torch.utils.data.Dataset[Any]):
    """PyTorch's own, which ends by an IndexError of the tensor that it indexes."""

    def __init__(self, stack: Tensor) -> None:
        self.stack = stack

    def __getitem__(self, place: int) -> Tensor:
        return self.stack[place]

    def __len__(self) -> int:
        return len(self.stack)


def each_in_turn(rows: Tensor) -> Iterator[Tensor]:
    yield from rows


# Of the rows x and their shifts, both of shape (COUNT, 4).
FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list of tensors": lambda x, s: list(x + s),
    "tuple of tensors": lambda x, s: tuple(x + s),
    "list of tuples": lambda x, s: list(zip(x, s, strict=True)),
    "list of tuples of one": lambda x, s: [(each,) for each in x + s],
    "list of mappings": lambda x, s: [{"x": a, "shift": b} for a, b in zip(x, s, strict=True)],
    "list of read-only mappings": lambda x, s: [
        MappingProxyType({"x": a, "shift": b}) for a, b in zip(x, s, strict=True)
    ],
    "list of ordered mappings": lambda x, s: [OrderedDict(shift=b, x=a) for a, b in zip(x, s, strict=True)],
    "list of mixed": lambda x, s: [(x[0], s[0]), {"x": x[1], "shift": s[1]}, *(x + s)[2:]],
    "generator": lambda x, s: each_in_turn(x + s),
    "map": lambda x, s: map(torch.add, x, s),
    "zip": lambda x, s: zip(x, s, strict=True),
    "data set": lambda x, s: DataSet(list(x + s)),
    "data set of tuples": lambda x, s: DataSet(list(zip(x, s, strict=True))),
    "torch's data set": lambda x, s: OwnTensors(x + s),
    "data loader": lambda x, s: torch.utils.data.DataLoader(OwnTensors(x + s), batch_size=None),
    "values of a mapping": lambda x, s: dict(enumerate(x + s)).values(),
    "stacked tensor": lambda x, s: x + s,
    "mapping of stacked tensors": lambda x, s: {"x": x, "shift": s},
    "ordered mapping of stacked tensors": lambda x, s: OrderedDict(shift=s, x=x),
}


def rows(place: Place, count: int = COUNT) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return place.randn(count, 4), place.randn(count, 4)


def model_of(place: Place) -> nn.Module:
    torch.manual_seed(7)
    return Sum().to(place.device, place.dtype)


def expected_of(place: Place, combination: str = "boltzmann", count: int = COUNT) -> dict[str, Tensor | None]:
    model = model_of(place)
    of_both(full_graph(model, torch.add(*rows(place, count)), COMBINATIONS[combination]())).backward()
    return gradients_of(dict(model.named_parameters()))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, accumulator: str, double: Place) -> None:
    model = model_of(double)
    prediction = MultiPose(model, "boltzmann", accumulator=accumulator)(FORMS[form](*rows(double)))
    assert (prediction.combined.shape, prediction.per_pose.shape) == ((1,), (COUNT, 1))
    of_both(prediction).backward()
    assert_same_gradients(gradients_of(dict(model.named_parameters())), expected_of(double))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_without_gradients(form: str, double: Place) -> None:
    model = model_of(double)
    with torch.no_grad():
        combined, predictions = MultiPose(model, "mean")(FORMS[form](*rows(double)))
        expected = model(torch.add(*rows(double)))
    torch.testing.assert_close(predictions, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined, expected.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_objects_by_call(accumulator: str, double: Place) -> None:
    model = model_of(double)
    poses = [Pose(x, shift) for x, shift in zip(*rows(double), strict=True)]
    scorer = MultiPose(
        model, "boltzmann", accumulator=accumulator, call=lambda model, pose: model(pose.x, shift=pose.shift)
    )
    of_both(scorer(poses)).backward()
    assert_same_gradients(gradients_of(dict(model.named_parameters())), expected_of(double))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_strings_by_call(accumulator: str, double: Place) -> None:
    model = model_of(double)
    table = dict(zip(["CCO", "CCN", "CC", "CO", "C"], torch.add(*rows(double)), strict=True))
    scorer = MultiPose(model, "boltzmann", accumulator=accumulator, call=lambda model, pose: model(table[pose]))
    of_both(scorer(list(table))).backward()
    assert_same_gradients(gradients_of(dict(model.named_parameters())), expected_of(double))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_call_gets_the_bare_model_and_the_pose(accumulator: str, double: Place) -> None:
    model = model_of(double)
    poses = list(torch.add(*rows(double)))
    seen: list[tuple[Any, Any]] = []

    def call(given: nn.Module, pose: Tensor) -> Tensor:
        seen.append((given, pose))
        return given(pose)

    MultiPose(model, "mean", accumulator=accumulator, call=call)(poses)
    assert [given for given, _ in seen] == [model] * COUNT
    assert [pose for _, pose in seen] == poses


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_tuples_that_a_loader_has_made_lists(grad_mode: Any, double: Place) -> None:
    model = nn.Bilinear(4, 4, 1).to(double.device, double.dtype)
    groups = [[(double.randn(4), double.randn(4)) for _ in range(3)]]
    (group,) = DataLoader(groups, batch_size=None)  # type: ignore[arg-type]
    assert isinstance(group[0], list)
    with grad_mode(), pytest.raises(TypeError, match="missing 1 required") as caught:
        MultiPose(model)(group)
    assert "collate_fn=" in "".join(caught.value.__notes__)
    (group,) = DataLoader(groups, batch_size=None, collate_fn=lambda group: group)  # type: ignore[arg-type]
    assert MultiPose(model)(group).combined.shape == (1,)


def test_a_generator_is_used_up_once(double: Place) -> None:
    taken = 0

    def generate() -> Iterator[Tensor]:
        nonlocal taken
        for row in torch.add(*rows(double)):
            taken += 1
            yield row

    model = model_of(double)
    of_both(MultiPose(model, "boltzmann", accumulator="recompute")(generate())).backward()
    assert taken == COUNT
    assert_same_gradients(gradients_of(dict(model.named_parameters())), expected_of(double))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_poses_of_different_sizes(accumulator: str, double: Place) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 6, 1)

        def forward(self, atoms: Tensor) -> Tensor:
            return self.net(atoms).mean(0)

    poses = [double.randn(size, 4) for size in (1, 7, 3, 2, 5)]

    def specimen() -> Specimen:
        torch.manual_seed(7)
        return Specimen(Pooled().to(double.device, double.dtype), lambda count: poses[:count])

    found = train_by_group(specimen(), COMBINATIONS["boltzmann"], of_both, COUNT, accumulator)
    expected = train_by_full_graph(specimen(), COMBINATIONS["boltzmann"], of_both, COUNT)
    assert_same_gradients(found.gradients, expected.gradients)


# -- chunks ---------------------------------------------------------------------------------------------------------


SIZES: list[Any] = [1, 2, 3, COUNT, COUNT + 1, "auto"]
CHUNKED_FORMS = ["generator", "data set", "stacked tensor", "mapping of stacked tensors"]


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("form", CHUNKED_FORMS)
def test_chunks(form: str, accumulator: str, double: Place) -> None:
    expected = expected_of(double)
    for size in SIZES:
        model = model_of(double)
        collate = None if "stacked" in form else torch.stack
        scorer = MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size=size, collate=collate)
        prediction = scorer(FORMS[form](*rows(double)))
        assert (prediction.combined.shape, prediction.per_pose.shape) == ((1,), (COUNT, 1)), size
        of_both(prediction).backward()
        assert_same_gradients(gradients_of(dict(model.named_parameters())), expected)
        expected_chunks = 1 if size == "auto" else -(-COUNT // size)
        assert (scorer.report.poses, scorer.report.chunks) == (COUNT, expected_chunks), size


def test_collate_with_stacked_poses_is_refused(double: Place) -> None:
    model = model_of(double)
    x, shift = rows(double)
    for stack in (x, {"x": x, "shift": shift}):
        with untouched(model), pytest.raises(PosesError, match=r"already stacked in .* pass a list of poses"):
            MultiPose(model, collate=torch.stack)(stack)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_how_many_poses_the_model_sees_at_once(accumulator: str, double: Place) -> None:
    model, sizes = model_of(double), list[tuple[int, bool]]()

    def call(model: nn.Module, chunk: Tensor) -> Tensor:
        sizes.append((len(chunk), torch.is_grad_enabled()))
        return model(chunk)

    scorer = MultiPose(model, "boltzmann", accumulator=accumulator, call=call, chunk_size=2)
    scorer(torch.add(*rows(double, 11))).combined.sum().backward()
    if accumulator in {"stream", "store"}:
        assert sizes == [(2, True)] * 5 + [(1, True)]
    else:
        assert sizes[:6] == [(2, True), *[(2, False)] * 4, (1, False)]
        assert all(with_graph for _, with_graph in sizes[6:])
    sizes.clear()
    with torch.no_grad():
        scorer(torch.add(*rows(double, 11)))
    assert sizes == [(2, False)] * 5 + [(1, False)]


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_chunks_of_several_outputs(accumulator: str, double: Place) -> None:
    expected = train_by_full_graph(build("vector_output", double), COMBINATIONS["boltzmann"], of_both, COUNT)
    for size in (1, 2, 3, COUNT):
        result = train_by_group(
            build("vector_output", double),
            COMBINATIONS["boltzmann"],
            of_both,
            COUNT,
            accumulator,
            chunk_size=size,
            collate=torch.stack,
        )
        assert_same_gradients(result.gradients, expected.gradients)


# -- graphs ---------------------------------------------------------------------------------------------------------


def schnet(place: Place) -> tuple[nn.Module, list[Any]]:
    data, layers = geometric()
    torch.manual_seed(7)
    model = layers.SchNet(8, 8, 2, 5, interaction_graph=all_edges).to(place.device, place.dtype)
    sizes = (4, 3, 5, 4, 2)
    return model, [
        data.Data(z=place.integers(8, size) + 1, pos=place.randn(size, 3).requires_grad_() * 2) for size in sizes
    ]


def positions(graphs: list[Any]) -> dict[str, Tensor]:
    for graph in graphs:
        graph.pos = graph.pos.detach().requires_grad_()
    return {f"positions {i}": graph.pos for i, graph in enumerate(graphs)}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_batches_of_graphs(accumulator: str, size: Any, double: Place) -> None:
    data, _ = geometric()
    model, graphs = schnet(double)
    leaves = {**dict(model.named_parameters()), **positions(graphs)}
    scorer = MultiPose(
        model,
        "boltzmann",
        accumulator=accumulator,
        chunk_size=size,
        collate=data.Batch.from_data_list,
        call=lambda model, batch: model(batch.z, batch.pos, batch.batch),
    )
    prediction = scorer(graphs)
    assert (prediction.combined.shape, prediction.per_pose.shape) == ((1,), (COUNT, 1))
    of_both(prediction).backward()
    plain, graphs = schnet(double)
    expected = {**dict(plain.named_parameters()), **positions(graphs)}
    of_both(
        full_graph(
            plain, graphs, COMBINATIONS["boltzmann"](), call=lambda model, graph: model(graph.z, graph.pos).squeeze(0)
        )
    ).backward()
    assert_same_gradients(gradients_of(leaves), gradients_of(expected))


def test_a_batch_of_graphs_is_no_group(double: Place) -> None:
    data, _ = geometric()
    model, graphs = schnet(double)
    batch = data.Batch.from_data_list(graphs)
    with untouched(model), pytest.raises(PosesError, match=r"one .*Batch; pass a list of poses .*to_data_list"):
        MultiPose(model)(batch)
    with untouched(model), pytest.raises(PosesError, match=r"one Data; pass a list of poses"):
        MultiPose(model)(graphs[0])
    scorer = MultiPose(model, "mean", call=lambda model, graph: model(graph.z, graph.pos))
    assert scorer(batch.to_data_list()).per_pose.shape == (COUNT, 1, 1)


# -- predictions ----------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "()": ((), lambda y: y[..., 0]),
    "(1,)": ((1,), lambda y: y[..., :1]),
    "(1, 1)": ((1, 1), lambda y: y[..., :1, None]),
    "(3,)": ((3,), lambda y: y),
    "(3, 1)": ((3, 1), lambda y: y[..., None]),
    "(1, 3)": ((1, 3), lambda y: y[..., None, :]),
}


class Shaping(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = mlp(4, 6, 3)
        self.shape = shape

    def forward(self, pose: Tensor) -> Any:
        return self.shape(self.net(pose))


def shaping(place: Place, shape: Callable[[Tensor], Any]) -> Specimen:
    torch.manual_seed(7)
    model = Shaping(shape).to(place.device, place.dtype)
    poses = place.randn(COUNT, 4)
    return Specimen(model, lambda count: list(poses[:count]))


@pytest.mark.parametrize("chunk_size", [None, 2], ids=["single", "chunks"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", ["mean", "boltzmann learnable"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, combination: str, accumulator: str, chunk_size: int | None, double: Place) -> None:
    wanted, change = SHAPES[shape]
    options: dict[str, Any] = {} if chunk_size is None else {"chunk_size": chunk_size, "collate": torch.stack}
    found = train_by_group(shaping(double, change), COMBINATIONS[combination], of_both, COUNT, accumulator, **options)
    expected = train_by_full_graph(shaping(double, change), COMBINATIONS[combination], of_both, COUNT)
    assert (found.prediction[0].shape, found.prediction[1].shape) == (wanted, (COUNT, *wanted))
    torch.testing.assert_close(found.prediction, expected.prediction, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found.gradients, expected.gradients)


class ModelOutput(OrderedDict[str, Any]):
    """What Hugging Face's models return: a mapping with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Output:
    logits: Tensor


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dict": (lambda y: {"logits": y, "hidden": y}, r"dict with keys 'logits', 'hidden'"),
    "model output": (lambda y: ModelOutput(logits=y, loss=None), r"ModelOutput with keys 'logits', 'loss'"),
    "tuple": (lambda y: (y, y), r"tuple of 2"),
    "list": (lambda y: [y], r"list of 1"),
    "dataclass": (Output, r"one Output"),
    "none": (lambda _: None, r"one NoneType"),
}


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_error_says_what_came_out(output: str, accumulator: str, double: Place) -> None:
    answer, message = OUTPUTS[output]
    specimen = shaping(double, answer)
    with untouched(specimen.model), pytest.raises(PredictionError, match=rf"pose 0: .* {message}, .*call="):
        MultiPose(specimen.model, accumulator=accumulator)(specimen.make_poses(2))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_call_chooses_among_outputs(accumulator: str, double: Place) -> None:
    specimen = shaping(double, OUTPUTS["model output"][0])
    specimen.call = lambda model, pose: model(pose).logits
    found = train_by_group(specimen, COMBINATIONS["boltzmann"], of_both, COUNT, accumulator)
    expected = train_by_full_graph(shaping(double, lambda y: y), COMBINATIONS["boltzmann"], of_both, COUNT)
    assert_same_gradients(found.gradients, expected.gradients)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_later_pose_of_another_shape(accumulator: str, chunk_size: int, double: Place) -> None:
    model = Shaping(lambda y: y if y.sum() > -1e6 else y[..., :2]).to(double.device, double.dtype)
    poses = double.randn(4, 4)
    poses[2:] = -1e9
    model.net = nn.Linear(4, 3).to(double.device, double.dtype)
    nn.init.ones_(model.net.weight)
    with untouched(model), pytest.raises(PredictionError, match=r"pose 2: .* shape \(2,\), that of pose 0 \(3,\)"):
        MultiPose(model, accumulator=accumulator, chunk_size=chunk_size)(poses)


# -- groups that are none -------------------------------------------------------------------------------------------


EMPTY: dict[str, Callable[[], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda: iter(()),
    "data set": lambda: DataSet([]),
    "tensor": lambda: torch.zeros(0, 4),
    "mapping": dict,
    "mapping of tensors": lambda: {"x": torch.zeros(0, 4)},
    "tensor that requires grad": lambda: torch.zeros(0, 4, requires_grad=True),
}


@pytest.mark.parametrize("options", [{}, {"collate": torch.stack, "chunk_size": 2}], ids=["single", "chunks"])
@pytest.mark.parametrize("nothing", EMPTY)
def test_an_empty_group(nothing: str, options: dict[str, Any], double: Place) -> None:
    model = model_of(double)
    with untouched(model), pytest.raises(PosesError, match="the group is empty"):
        MultiPose(model, **options)(EMPTY[nothing]())


@pytest.mark.parametrize("text", ["CCO", b"CCO"])
def test_a_string_is_no_group(text: Any, double: Place) -> None:
    model = model_of(double)
    with untouched(model), pytest.raises(PosesError, match=rf"got one {type(text).__name__}; pass a list of poses"):
        MultiPose(model)(text)


def test_an_object_is_no_group(double: Place) -> None:
    model, pose = model_of(double), Pose(double.randn(4), double.randn(4))
    with untouched(model), pytest.raises(PosesError, match="got one Pose; pass a list of poses"):
        MultiPose(model)(pose)


def test_a_mapping_of_ragged_stacks(double: Place) -> None:
    model = model_of(double)
    x, shift = rows(double)
    with untouched(model), pytest.raises(PosesError, match=r"length of axis 0, got \{'x': 5, 'shift': 4\}"):
        MultiPose(model)({"x": x, "shift": shift[:4]})


def test_a_list_in_chunks_needs_collate(double: Place) -> None:
    model, poses = model_of(double), double.randn(COUNT, 4)
    with untouched(model), pytest.raises(PosesError, match="collate="):
        MultiPose(model, chunk_size=2)(list(poses))
    with untouched(model), pytest.raises(PosesError, match="collate="):
        MultiPose(model, chunk_size="auto")(iter(poses))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_stack_of_poses_for_a_model_of_single_poses(accumulator: str, double: Place) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 6, 1)

        def forward(self, pose: Tensor) -> Tensor:
            return self.net(pose).mean()

    model, poses = Single().to(double.device, double.dtype), double.randn(COUNT, 4)
    with untouched(model), pytest.raises(PredictionError, match=r"must give 2 rows, .*poses.unbind\(\)"):
        MultiPose(model, accumulator=accumulator, chunk_size=2)(poses)
    assert MultiPose(model, accumulator=accumulator)(poses.unbind()).per_pose.shape == (COUNT,)

"""Poses in any form give the gradients of the full graph; everything else is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from model_state import unchanged
from model_zoo import ModelCase, TensorFactory, mlp
from pose_forms import COUNT, FORMS, PlainDataset, Pose, assert_gradients_of_full_graph, make_model, random_rows
from seeding import manual_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    assert_same_gradients,
    case_label,
    loss_on_both,
    train_full_graph,
    train_multi_pose,
)

from gradhooks import MultiPose
from gradhooks.errors import PosesError, PredictionError


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, double: TensorFactory) -> None:
    for accumulator in CONCRETE_ACCUMULATORS:
        model = make_model(double)
        prediction = MultiPose(model, "boltzmann", accumulator=accumulator)(FORMS[form](*random_rows(double)))
        assert (prediction.combined.shape, prediction.per_pose.shape) == ((1,), (COUNT, 1)), accumulator
        loss_on_both(prediction).backward()
        with case_label(accumulator):
            assert_gradients_of_full_graph(model, double)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_without_gradients(form: str, double: TensorFactory) -> None:
    model = make_model(double)
    with torch.no_grad():
        combined, predictions = MultiPose(model, "mean")(FORMS[form](*random_rows(double)))
        expected = model(torch.add(*random_rows(double)))
    torch.testing.assert_close(predictions, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined, expected.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_objects_with_call(accumulator: str, double: TensorFactory) -> None:
    model = make_model(double)
    poses = [Pose(x, shift) for x, shift in zip(*random_rows(double), strict=True)]
    scorer = MultiPose(
        model, "boltzmann", accumulator=accumulator, call=lambda model, pose: model(pose.x, shift=pose.shift)
    )
    loss_on_both(scorer(poses)).backward()
    assert_gradients_of_full_graph(model, double)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_strings_with_call(accumulator: str, double: TensorFactory) -> None:
    model = make_model(double)
    features = dict(zip(["CCO", "CCN", "CC", "CO", "C"], torch.add(*random_rows(double)), strict=True))
    scorer = MultiPose(model, "boltzmann", accumulator=accumulator, call=lambda model, pose: model(features[pose]))
    loss_on_both(scorer(list(features))).backward()
    assert_gradients_of_full_graph(model, double)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_call_gets_the_bare_model_and_the_pose(accumulator: str, double: TensorFactory) -> None:
    model = make_model(double)
    poses = list(torch.add(*random_rows(double)))
    arguments: list[tuple[Any, Any]] = []

    def call(received: nn.Module, pose: Tensor) -> Tensor:
        arguments.append((received, pose))
        return received(pose)

    MultiPose(model, "mean", accumulator=accumulator, call=call, audit=False)(poses)
    assert [received for received, _ in arguments] == [model] * COUNT
    assert [pose for _, pose in arguments] == poses


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_tuples_that_a_data_loader_turned_into_lists(grad_mode: Any, double: TensorFactory) -> None:
    model = nn.Bilinear(4, 4, 1).to(double.device, double.dtype)
    groups = [[(double.randn(4), double.randn(4)) for _ in range(3)]]
    (group,) = DataLoader(groups, batch_size=None)  # type: ignore[arg-type]
    assert isinstance(group[0], list)
    with grad_mode(), pytest.raises(PosesError, match=r"pose 0 is a list of 2.*collate_fn="):
        MultiPose(model)(group)
    (group,) = DataLoader(groups, batch_size=None, collate_fn=lambda group: group)  # type: ignore[arg-type]
    assert MultiPose(model)(group).combined.shape == (1,)


def test_a_generator_is_consumed_once(double: TensorFactory) -> None:
    yielded = 0

    def generate() -> Iterator[Tensor]:
        nonlocal yielded
        for row in torch.add(*random_rows(double)):
            yielded += 1
            yield row

    model = make_model(double)
    loss_on_both(MultiPose(model, "boltzmann", accumulator="recompute")(generate())).backward()
    assert yielded == COUNT
    assert_gradients_of_full_graph(model, double)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_poses_of_different_sizes(accumulator: str, double: TensorFactory) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 6, 1)

        def forward(self, atoms: Tensor) -> Tensor:
            return self.net(atoms).mean(0)

    poses = [double.randn(size, 4) for size in (1, 7, 3, 2, 5)]

    def case() -> ModelCase:
        manual_seed(7)
        return ModelCase(Pooled().to(double.device, double.dtype), lambda count: poses[:count])

    result = train_multi_pose(case(), COMBINATIONS["boltzmann"], loss_on_both, COUNT, accumulator)
    expected = train_full_graph(case(), COMBINATIONS["boltzmann"], loss_on_both, COUNT)
    assert_same_gradients(result.gradients, expected.gradients)


# -- groups that are refused ----------------------------------------------------------------------------------------


EMPTY: dict[str, Callable[[], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda: iter(()),
    "dataset": lambda: PlainDataset([]),
    "tensor": lambda: torch.zeros(0, 4),
    "mapping": dict,
    "mapping of tensors": lambda: {"x": torch.zeros(0, 4)},
    "tensor that requires grad": lambda: torch.zeros(0, 4, requires_grad=True),
}


@pytest.mark.parametrize("options", [{}, {"collate": torch.stack, "chunk_size": 2}], ids=["single", "chunks"])
@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_group_is_refused(empty: str, options: dict[str, Any], double: TensorFactory) -> None:
    model = make_model(double)
    with unchanged(model), pytest.raises(PosesError, match="there are no poses"):
        MultiPose(model, **options)(EMPTY[empty]())


@pytest.mark.parametrize("text", ["CCO", b"CCO"])
def test_a_string_is_refused(text: Any, double: TensorFactory) -> None:
    model = make_model(double)
    with unchanged(model), pytest.raises(PosesError, match=rf"got one {type(text).__name__}; pass a list of poses"):
        MultiPose(model)(text)


def test_a_single_object_is_refused(double: TensorFactory) -> None:
    model, pose = make_model(double), Pose(double.randn(4), double.randn(4))
    with unchanged(model), pytest.raises(PosesError, match="got one Pose; pass a list of poses"):
        MultiPose(model)(pose)


def test_a_mapping_of_stacks_of_different_lengths_is_refused(double: TensorFactory) -> None:
    model = make_model(double)
    x, shift = random_rows(double)
    with unchanged(model), pytest.raises(PosesError, match=r"length of axis 0, got \{'x': 5, 'shift': 4\}"):
        MultiPose(model)({"x": x, "shift": shift[:4]})


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_stack_in_chunks_for_a_model_without_batch_axis_is_refused(accumulator: str, double: TensorFactory) -> None:
    class WithoutBatchAxis(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 6, 1)

        def forward(self, pose: Tensor) -> Tensor:
            return self.net(pose).mean()

    model, poses = WithoutBatchAxis().to(double.device, double.dtype), double.randn(COUNT, 4)
    with unchanged(model), pytest.raises(PredictionError, match=r"must give 2 rows, .*poses.unbind\(\)"):
        MultiPose(model, accumulator=accumulator, chunk_size=2)(poses)
    assert MultiPose(model, accumulator=accumulator)(poses.unbind()).per_pose.shape == (COUNT,)

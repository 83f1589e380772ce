"""Gradients, predictions, buffers and random state of a group are those of the full graph."""

import functools

import pytest
import torch
from model_zoo import ZOO, ModelCase, TensorFactory, build
from model_zoo.shared_tensors import reused_gradient_memory
from torch import Tensor
from torch.utils._pytree import tree_map_only
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    LOSSES,
    Gradients,
    Loss,
    TrainingResult,
    assert_bit_equal,
    assert_same_gradients,
    assert_same_training,
    case_label,
    loss_on_both,
    loss_on_combined,
    relative_errors,
    train_full_graph,
    train_multi_pose,
)


@functools.cache
def full_graph_result(
    name: str, factory: TensorFactory, combination: str, loss: Loss = loss_on_both, count: int = 5
) -> TrainingResult:
    """Train with the full graph, once in a process: the accumulators share the result."""
    return train_full_graph(build(name, factory), COMBINATIONS[combination], loss, count)


def multi_pose_result(
    accumulator: str,
    name: str,
    factory: TensorFactory,
    combination: str,
    loss: Loss = loss_on_both,
    *,
    count: int = 5,
    tolerance: float | None = None,
) -> TrainingResult:
    case = build(name, factory)
    return train_multi_pose(case, COMBINATIONS[combination], loss, count, accumulator, tolerance=tolerance)


def assert_exact(
    name: str, factory: TensorFactory, combination: str, loss: Loss, *, accumulators: list[str], count: int = 5
) -> dict[str, TrainingResult]:
    """Compare every accumulator with the full graph, and return what they computed."""
    expected = full_graph_result(name, factory, combination, loss, count)
    results: dict[str, TrainingResult] = {}
    for accumulator in accumulators:
        with case_label(accumulator, loss.__name__, count):
            results[accumulator] = multi_pose_result(accumulator, name, factory, combination, loss, count=count)
            assert_same_training(results[accumulator], expected)
    return results


def assert_auto_delegates(results: dict[str, TrainingResult], expected_accumulator: str) -> None:
    """Assert that "auto" reports the accumulator that it should choose, and gives the bits of that one."""
    with case_label("auto"):
        assert results["auto"].accumulator == expected_accumulator
        assert_same_training(results["auto"], results[expected_accumulator], tolerance=0.0)


# "min": sharp, one sum of a stream. "boltzmann learnable": all poses matter, two sums. "attention": no stream.
@pytest.mark.parametrize("combination", ["min", "boltzmann learnable", "attention"])
@pytest.mark.parametrize("name", ZOO)
def test_every_model(name: str, combination: str, double: TensorFactory) -> None:
    accumulators = ACCUMULATORS if combination == "boltzmann learnable" else CONCRETE_ACCUMULATORS
    results = assert_exact(name, double, combination, loss_on_both, accumulators=accumulators)
    if "auto" in accumulators:
        assert_auto_delegates(results, "recompute")


@pytest.mark.parametrize("name", ZOO)
def test_every_model_with_a_loss_on_the_combined_prediction(name: str, double: TensorFactory) -> None:
    assert_exact(name, double, "min", loss_on_combined, accumulators=["stream", "recompute"])
    results = assert_exact(name, double, "mean", loss_on_combined, accumulators=["stream", "recompute", "auto"])
    is_scalar = results["auto"].prediction[1][0].numel() == 1
    assert_auto_delegates(results, "stream" if is_scalar else "recompute")


CHOSEN_BY_AUTO = {"mean": "stream"}
"""What "auto" chooses for the first group, if it is not recompute."""


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination(combination: str, loss: str, double: TensorFactory) -> None:
    for count in (1, 2, 7):
        accumulators = ACCUMULATORS if count == 7 else CONCRETE_ACCUMULATORS
        results = assert_exact("plain_mlp", double, combination, LOSSES[loss], accumulators=accumulators, count=count)
        if "auto" in accumulators:
            assert_auto_delegates(results, CHOSEN_BY_AUTO.get(combination, "recompute"))


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", ["vector_output", "dropout", "used_by_some_poses"])
def test_every_combination_with_recompute(name: str, combination: str, double: TensorFactory) -> None:
    for loss in LOSSES.values():
        assert_exact(name, double, combination, loss, accumulators=["recompute"])


@pytest.mark.parametrize("combination", ["min", "boltzmann"])
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.same_in_every_dtype])
def test_float32_is_as_accurate_as_the_full_graph(
    name: str, combination: str, single: TensorFactory, double: TensorFactory
) -> None:
    exact = full_graph_result(name, double, combination).gradients
    full_graph = full_graph_result(name, single, combination).gradients
    for accumulator in CONCRETE_ACCUMULATORS:
        with case_label(accumulator):
            result = multi_pose_result(accumulator, name, single, combination)
            assert_as_accurate(result.gradients, full_graph, exact)


def assert_as_accurate(result: Gradients, full_graph: Gradients, exact: Gradients) -> None:
    """Allow twice the error of the full graph, and the rounding of a sum of five numbers in another order."""
    rounding = 8 * torch.finfo(torch.float32).eps
    allowed = relative_errors(full_graph, exact, noise=0.1)
    too_large = {
        name: (error, allowed[name])
        for name, error in relative_errors(result, exact, noise=0.1).items()
        if not error <= 2 * allowed[name] + rounding
    }
    assert not too_large, f"(error, the full graph's): {too_large}"


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.bit_for_bit])
def test_recompute_agrees_to_the_last_bit(name: str, single: TensorFactory) -> None:
    cases: list[tuple[str, Loss, float | None]] = [
        ("mean", loss_on_both, None),
        ("min", loss_on_both, None),
        ("boltzmann", loss_on_both, None),
        # It reads its argument several times: with a loss on the poses as well, the full graph adds N numbers in
        # another order. Some parameters get gradients only from poses that the default tolerance skips.
        ("attention", loss_on_combined, 0.0),
    ]
    for combination, loss, tolerance in cases:
        with case_label(combination):
            result = multi_pose_result("recompute", name, single, combination, loss, tolerance=tolerance)
            assert_bit_equal(result.gradients, full_graph_result(name, single, combination, loss).gradients)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_bfloat16_gradients_are_summed_without_loss(accumulator: str, device: torch.device) -> None:
    # A running sum in bfloat16 would stop growing at 256 times the gradient of one pose.
    model = torch.nn.Linear(1, 1, bias=False).to(device, torch.bfloat16)
    result = train_multi_pose(
        ModelCase(model, lambda count: [torch.ones(1, device=device, dtype=torch.bfloat16)] * count),
        COMBINATIONS["mean"],
        lambda prediction: prediction.combined.sum(),
        1000,
        accumulator,
    )
    gradient = result.gradients["model weight"]
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert gradient.item() == pytest.approx(1.0, rel=0.005)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", ["mean", "min of scale 1", "boltzmann"])
def test_a_layer_that_reuses_the_memory_of_its_gradients(
    combination: str, accumulator: str, double: TensorFactory
) -> None:
    # The full graph is wrong here: it holds the gradients of all poses, in the same memory, until it adds them up.
    case = reused_gradient_memory(double)
    case.model.to(double.device, double.dtype)
    poses = torch.stack(case.make_poses(5))
    weight = case.model.get_parameter("weight").detach().clone().requires_grad_()
    COMBINATIONS[combination]()(poses @ weight).backward()
    result = train_multi_pose(case, COMBINATIONS[combination], lambda p: p.combined, 5, accumulator)
    assert_same_gradients(result.gradients, {"model weight": weight.grad})


@pytest.mark.parametrize("combination", ["mean", "boltzmann"])
@pytest.mark.parametrize("name", ["plain_mlp", "vector_output", "tied_weights", "used_by_some_poses"])
def test_bfloat16_is_as_accurate_as_the_full_graph(name: str, combination: str, device: torch.device) -> None:
    half = TensorFactory(device, torch.bfloat16)
    exact = train_full_graph(_widened(build(name, half)), COMBINATIONS[combination], loss_on_both, 7).gradients
    full_graph = full_graph_result(name, half, combination, count=7).gradients
    allowed, rounding = relative_errors(full_graph, exact), 2 * torch.finfo(torch.bfloat16).eps
    for accumulator in ACCUMULATORS:
        with case_label(accumulator):
            result = multi_pose_result(accumulator, name, half, combination, count=7)
            errors = relative_errors(result.gradients, exact)
            assert all(error <= 2 * allowed[leaf] + rounding for leaf, error in errors.items())


def _widened(case: ModelCase) -> ModelCase:
    make_poses = case.make_poses
    case.model.double()
    case.make_poses = lambda count: [tree_map_only(Tensor, Tensor.double, pose) for pose in make_poses(count)]
    return case

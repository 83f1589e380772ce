"""The gradient of a group is the full graph's."""

import pytest
import torch
from model_zoo import ZOO, Place, Specimen, build
from model_zoo.shared_tensors import reused_gradient_memory
from torch import Tensor
from torch.utils._pytree import tree_map_only
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    LOSSES,
    Gradients,
    Loss,
    Trained,
    assert_bit_equal,
    assert_same_gradients,
    assert_same_training,
    distances,
    of_both,
    of_combined,
    train_by_full_graph,
    train_by_group,
)

# Sharp and streamed in one sum; all poses matter, two sums; not streamable, of parameters of its own.
TELLING_COMBINATIONS = ["min", "boltzmann learnable", "attention"]


def both_ways(
    name: str, place: Place, combination: str, accumulator: str, loss: Loss, *, count: int = 5
) -> tuple[Trained, Trained]:
    found = train_by_group(build(name, place), COMBINATIONS[combination], loss, count, accumulator)
    return found, train_by_full_graph(build(name, place), COMBINATIONS[combination], loss, count)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", TELLING_COMBINATIONS)
@pytest.mark.parametrize("name", ZOO)
def test_every_model(name: str, combination: str, accumulator: str, double: Place) -> None:
    found, expected = both_ways(name, double, combination, accumulator, of_both)
    assert_same_training(found, expected)


@pytest.mark.parametrize("accumulator", ["stream", "recompute"])
@pytest.mark.parametrize("combination", ["mean", "min"])
@pytest.mark.parametrize("name", ZOO)
def test_every_model_by_the_combination_alone(name: str, combination: str, accumulator: str, double: Place) -> None:
    found, expected = both_ways(name, double, combination, accumulator, of_combined)
    assert_same_training(found, expected)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination(combination: str, accumulator: str, loss: str, count: int, double: Place) -> None:
    found, expected = both_ways("plain_mlp", double, combination, accumulator, LOSSES[loss], count=count)
    assert_same_training(found, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", ["vector_output", "dropout", "used_by_some_poses"])
def test_every_combination_by_recomputing(name: str, combination: str, loss: str, double: Place) -> None:
    found, expected = both_ways(name, double, combination, "recompute", LOSSES[loss])
    assert_same_training(found, expected)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", ["min", "boltzmann"])
@pytest.mark.parametrize("name", [name for name, species in ZOO.items() if species.same_in_every_dtype])
def test_float32_is_as_near_to_the_truth_as_the_full_graph(
    name: str, combination: str, accumulator: str, single: Place, double: Place
) -> None:
    truth = train_by_full_graph(build(name, double), COMBINATIONS[combination], of_both, 5)
    found, expected = both_ways(name, single, combination, accumulator, of_both)
    assert_no_further(found.gradients, expected.gradients, truth.gradients)


def assert_no_further(found: Gradients, expected: Gradients, truth: Gradients) -> None:
    """Twice the full graph's own distance, and what rounding a sum of five differently may add."""
    rounding = 8 * torch.finfo(torch.float32).eps
    own = distances(expected, truth, noise=0.1)
    too_far = {
        name: (distance, own[name])
        for name, distance in distances(found, truth, noise=0.1).items()
        if not distance <= 2 * own[name] + rounding
    }
    assert not too_far, f"(distance, the full graph's): {too_far}"


@pytest.mark.parametrize(
    ("combination", "loss", "tolerance"),
    [
        ("mean", of_both, None),
        ("min", of_both, None),
        ("boltzmann", of_both, None),
        # It reads its argument several times: beside a direct loss, the full graph adds N numbers in another order.
        # What skipping leaves out is some parameters' only gradient here.
        ("attention", of_combined, 0.0),
    ],
    ids=["mean", "min", "boltzmann", "attention"],
)
@pytest.mark.parametrize("name", [name for name, species in ZOO.items() if species.bit_for_bit])
def test_recompute_agrees_to_the_last_bit(
    name: str, combination: str, loss: Loss, tolerance: float | None, single: Place
) -> None:
    make_combination = COMBINATIONS[combination]
    found = train_by_group(build(name, single), make_combination, loss, 5, "recompute", tolerance=tolerance)
    expected = train_by_full_graph(build(name, single), make_combination, loss, 5)
    assert_bit_equal(found.gradients, expected.gradients)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_parameters_of_half_precision_lose_nothing_to_the_sum(accumulator: str, device: torch.device) -> None:
    # A running sum in bfloat16 would stop growing at 256 times one pose's share.
    model = torch.nn.Linear(1, 1, bias=False).to(device, torch.bfloat16)
    found = train_by_group(
        Specimen(model, lambda count: [torch.ones(1, device=device, dtype=torch.bfloat16)] * count),
        COMBINATIONS["mean"],
        lambda prediction: prediction.combined.sum(),
        1000,
        accumulator,
    )
    gradient = found.gradients["model weight"]
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert gradient.item() == pytest.approx(1.0, rel=0.005)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", ["mean", "min of scale 1", "boltzmann"])
def test_a_layer_that_reuses_the_memory_of_its_gradients(combination: str, accumulator: str, double: Place) -> None:
    # The full graph is no oracle here: it holds the poses' gradients, all in one memory, until it adds them up.
    specimen = reused_gradient_memory(double)
    specimen.model.to(double.device, double.dtype)
    poses = torch.stack(specimen.make_poses(5))
    weight = specimen.model.get_parameter("weight").detach().clone().requires_grad_()
    COMBINATIONS[combination]()(poses @ weight).backward()
    found = train_by_group(specimen, COMBINATIONS[combination], lambda p: p.combined, 5, accumulator)
    assert_same_gradients(found.gradients, {"model weight": weight.grad})


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("combination", ["mean", "boltzmann"])
@pytest.mark.parametrize("name", ["plain_mlp", "vector_output", "tied_weights", "used_by_some_poses"])
def test_half_precision_is_as_near_to_the_truth_as_the_full_graph(
    name: str, combination: str, accumulator: str, device: torch.device
) -> None:
    half = Place(device, torch.bfloat16)
    truth = train_by_full_graph(_widened(build(name, half)), COMBINATIONS[combination], of_both, 7).gradients
    found, expected = both_ways(name, half, combination, accumulator, of_both, count=7)
    own, rounding = distances(expected.gradients, truth), 2 * torch.finfo(torch.bfloat16).eps
    assert all(distance <= 2 * own[leaf] + rounding for leaf, distance in distances(found.gradients, truth).items())


def _widened(specimen: Specimen) -> Specimen:
    make_poses = specimen.make_poses
    specimen.model.double()
    specimen.make_poses = lambda count: [tree_map_only(Tensor, Tensor.double, pose) for pose in make_poses(count)]
    return specimen

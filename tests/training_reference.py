"""Train a model of the zoo with gradhooks and with the full graph, and compare everything that training changes."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from model_zoo import ModelCase
from plugin_combinations import AttentionPooling, LearnedSoftMinimum
from seeding import manual_seed
from torch import Tensor, nn

import gradhooks
from gradhooks.testing import full_graph

Gradients = dict[str, Tensor | None]
Loss = Callable[[gradhooks.MultiPosePrediction], Tensor]
MakeCombination = Callable[[], Any]


def sum_predictions(predictions: Tensor) -> Tensor:
    return predictions.sum(0)


COMBINATIONS: dict[str, MakeCombination] = {
    "mean": gradhooks.combinations.Mean,
    "min": gradhooks.combinations.Min,
    "max": gradhooks.combinations.Max,
    "min of scale 1": lambda: gradhooks.combinations.Min(scale=1.0),
    "max of scale 1": lambda: gradhooks.combinations.Max(scale=1.0),
    "min normalised": lambda: gradhooks.combinations.Min(scale=3.0, normalize=True),
    "boltzmann": gradhooks.combinations.Boltzmann,
    "boltzmann learnable": lambda: gradhooks.combinations.Boltzmann(0.9, learnable=True),
    "attention": AttentionPooling,
    "learned soft minimum": LearnedSoftMinimum,
    "function": lambda: sum_predictions,
}

ACCUMULATORS = ["store", "stream", "recompute", "auto"]
CONCRETE_ACCUMULATORS = ["store", "stream", "recompute"]
"""Those that "auto" chooses from."""

ACCUMULATORS_AND_PLAIN = [*ACCUMULATORS, "plain"]
"""The accumulators, each of which intercepts all poses, and the default, with which all poses run plainly."""


def options_of(name: str) -> dict[str, Any]:
    """Return the options that stand for a name in `ACCUMULATORS_AND_PLAIN`."""
    return {"accumulator": "auto"} if name == "plain" else {"accumulator": name, "memory": 0}


def loss_on_combined(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return (prediction.combined - 0.3).square().sum()


def loss_on_poses(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.per_pose.tanh().square().sum()


def loss_on_both(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return loss_on_combined(prediction) + 0.5 * loss_on_poses(prediction)


def loss_on_last_pose(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.per_pose[-1].square().sum()


LOSSES: dict[str, Loss] = {
    "combined": loss_on_combined,
    "poses": loss_on_poses,
    "both": loss_on_both,
    "one pose": loss_on_last_pose,
}


@dataclass(frozen=True)
class TrainingResult:
    """What one training step changes.

    Attributes:
        prediction: The combined prediction and those of the poses.
        gradients: Of all leaves, by name.
        buffers: Of the model, by name.
        random_state: Of PyTorch's default CPU generator.
        accumulator: What the report says did the work; empty for the full graph.
    """

    prediction: tuple[Tensor, Tensor]
    gradients: Gradients
    buffers: dict[str, Tensor]
    random_state: Tensor
    accumulator: str = ""


def trained_leaves(case: ModelCase, combination: Any) -> dict[str, Tensor]:
    """Return every leaf that is trained, by name."""
    leaves: dict[str, Tensor] = {f"model {name}": leaf for name, leaf in case.model.named_parameters()}
    leaves.update(case.outside)
    if isinstance(combination, nn.Module):
        leaves.update({f"combination {name}": leaf for name, leaf in combination.named_parameters()})
    return leaves


def gradients_of(leaves: dict[str, Tensor]) -> Gradients:
    return {name: None if leaf.grad is None else leaf.grad.detach().clone() for name, leaf in leaves.items()}


def train_full_graph(
    case: ModelCase, make_combination: MakeCombination, loss: Loss, count: int, *, seed: int = 3
) -> TrainingResult:
    combination = move_to_device(make_combination(), case)
    poses = case.make_poses(count)
    manual_seed(seed)
    prediction = full_graph(case.model, poses, combination, call=case.plain_call or case.call)
    return _after_backward(case, combination, prediction, loss)


def train_multi_pose(
    case: ModelCase,
    make_combination: MakeCombination,
    loss: Loss,
    count: int,
    accumulator: Any,
    *,
    seed: int = 3,
    memory: str | float = 0,
    **options: Any,
) -> TrainingResult:
    """Train with gradhooks; by default without memory for plain chunks, so that all poses are intercepted."""
    combination = move_to_device(make_combination(), case)
    poses = case.make_poses(count)
    options = {"call": case.call, "memory": memory, **options}
    scorer = gradhooks.MultiPose(case.model, combination, accumulator=accumulator, **options)
    manual_seed(seed)
    result = _after_backward(case, combination, scorer(poses), loss)
    return dataclasses.replace(result, accumulator=scorer.report.accumulator)


def move_to_device(combination: Any, case: ModelCase) -> Any:
    """Return the combination on the device of the case."""
    device = next(iter([*case.model.parameters(), *case.outside.values()])).device
    return combination.to(device) if isinstance(combination, nn.Module) else combination


def _after_backward(
    case: ModelCase, combination: Any, prediction: gradhooks.MultiPosePrediction, loss: Loss
) -> TrainingResult:
    loss(prediction).backward()
    return TrainingResult(
        prediction=(prediction.combined.detach().clone(), prediction.per_pose.detach().clone()),
        gradients=gradients_of(trained_leaves(case, combination)),
        buffers={name: buffer.clone() for name, buffer in case.model.named_buffers()},
        random_state=torch.get_rng_state(),
    )


@contextmanager
def case_label(*labels: object) -> Iterator[None]:
    """Name the case of a loop in the message of an error."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"[{' - '.join(map(str, labels))}] {type(error).__name__}: {error}") from error


def relative_errors(result: Gradients, expected: Gradients, noise: float = 1e-4) -> dict[str, float]:
    """Return the distance of each gradient from the expected one, relative to the size of the expected one.

    The rounding error of a gradient smaller than `noise` times the largest of the model (the bias before a
    normalisation) is that of the large ones, so it is divided by that size. Below `NEGLIGIBLE_NORM` it counts as zero.
    """
    largest = max((_size(gradient) for gradient in expected.values() if gradient is not None), default=0.0)
    return {
        name: _distance(result[name], gradient, floor=max(noise * largest, NEGLIGIBLE_NORM))
        for name, gradient in expected.items()
        if gradient is not None
    }


def _distance(result: Tensor | None, expected: Tensor, floor: float) -> float:
    assert result is not None
    if not bool(torch.isfinite(_dense(expected)).all()):
        return 0.0 if torch.equal(_dense(result).isnan(), _dense(expected).isnan()) else float("inf")
    difference = _size(_dense(result) - _dense(expected))
    return 0.0 if difference == 0 else difference / max(_size(expected), floor)


def _dense(gradient: Tensor) -> Tensor:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient.to(torch.complex128 if gradient.is_complex() else torch.float64)


def _size(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(_dense(gradient)))


NEGLIGIBLE_NORM = 1e-9
"""Smaller gradients come from poses with a negligible coefficient: all numbers of the zoo are of order 1."""


def assert_same_layout(result: Gradients, expected: Gradients) -> None:
    """Assert that the same leaves have gradients, of the same shape, dtype, layout, device and strides."""
    assert {name: _form(gradient) for name, gradient in result.items()} == {
        name: _form(gradient) for name, gradient in expected.items()
    }


def _form(gradient: Tensor | None) -> Any:
    if gradient is None:
        return None
    return tuple(gradient.shape), gradient.dtype, gradient.layout, gradient.device, _strides(gradient)


def _strides(gradient: Tensor) -> Any:
    # The stride of an axis of length 1 is arbitrary.
    if gradient.is_sparse:
        return None
    return [stride for stride, length in zip(gradient.stride(), gradient.shape, strict=True) if length > 1]


def assert_same_gradients(result: Gradients, expected: Gradients, tolerance: float = 1e-12) -> None:
    """Assert equal layout, and equal values to `tolerance` relative to the size of each gradient."""
    assert_same_layout(result, expected)
    too_far = {
        name: distance for name, distance in relative_errors(result, expected).items() if not distance <= tolerance
    }
    assert not too_far, f"gradients differ from the full graph's by more than {tolerance}: {too_far}"


def assert_bit_equal(result: Gradients, expected: Gradients) -> None:
    assert_same_layout(result, expected)
    different = [
        name for name, gradient in expected.items() if gradient is not None and not _equal(result[name], gradient)
    ]
    assert not different, f"gradients that are not bit-equal: {different}"


def _equal(result: Tensor | None, expected: Tensor) -> bool:
    return result is not None and torch.equal(_dense(result), _dense(expected))


def assert_same_training(result: TrainingResult, expected: TrainingResult, tolerance: float = 1e-12) -> None:
    """Assert equal predictions and gradients to `tolerance`, and equal buffers and random state."""
    for result_tensor, expected_tensor in zip(result.prediction, expected.prediction, strict=True):
        torch.testing.assert_close(result_tensor, expected_tensor, rtol=tolerance, atol=tolerance)
    assert_same_gradients(result.gradients, expected.gradients, tolerance)
    assert result.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        assert torch.equal(result.buffers[name], buffer), name
    assert torch.equal(result.random_state, expected.random_state), "global random state"

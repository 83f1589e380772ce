"""Trains a specimen by gradhooks and by the full graph, and compares all that it left behind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from model_zoo import Specimen
from torch import Tensor, nn

import gradhooks
from gradhooks.testing import full_graph

Gradients = dict[str, Tensor | None]
Loss = Callable[[gradhooks.MultiPosePrediction], Tensor]
MakeCombination = Callable[[], Any]


class AttentionPooling(nn.Module):
    """What a third party may bring: trained weights, and no declaration for a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.tensor([0.7, -0.3]))

    def forward(self, predictions: Tensor) -> Tensor:
        scores = self.query[0] * predictions + self.query[1] * predictions.square()
        return (torch.softmax(scores, 0) * predictions).sum(0)


class LearnedSoftMinimum(gradhooks.Combination):
    """A third party's subclass of `Combination`, which declares its weights and has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, predictions: Tensor) -> Tensor:
        return -torch.logsumexp(-self.steepness * predictions.double(), 0).to(predictions.dtype) / self.steepness

    def stream_weights(self, predictions: Tensor) -> gradhooks.StreamWeights:
        return gradhooks.StreamWeights(log_weights=-self.steepness.detach() * predictions)


def summed(predictions: Tensor) -> Tensor:
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
    "function": lambda: summed,
}

ACCUMULATORS = ["store", "stream", "recompute", "auto"]


def of_combined(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return (prediction.combined - 0.3).square().sum()


def of_poses(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.per_pose.tanh().square().sum()


def of_both(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return of_combined(prediction) + 0.5 * of_poses(prediction)


def of_one_pose(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.per_pose[-1].square().sum()


LOSSES: dict[str, Loss] = {"combined": of_combined, "poses": of_poses, "both": of_both, "one pose": of_one_pose}


@dataclass(frozen=True)
class Trained:
    """All that one training step leaves behind."""

    prediction: tuple[Tensor, Tensor]
    gradients: Gradients
    buffers: dict[str, Tensor]
    random_state: Tensor


def leaves_of(specimen: Specimen, combination: Any) -> dict[str, Tensor]:
    """Everything that is trained, by name."""
    leaves: dict[str, Tensor] = {f"model {name}": leaf for name, leaf in specimen.model.named_parameters()}
    leaves.update(specimen.outside)
    if isinstance(combination, nn.Module):
        leaves.update({f"combination {name}": leaf for name, leaf in combination.named_parameters()})
    return leaves


def gradients_of(leaves: dict[str, Tensor]) -> Gradients:
    return {name: None if leaf.grad is None else leaf.grad.detach().clone() for name, leaf in leaves.items()}


def train_by_full_graph(
    specimen: Specimen, make_combination: MakeCombination, loss: Loss, count: int, *, seed: int = 3
) -> Trained:
    combination = moved(make_combination(), specimen)
    poses = specimen.make_poses(count)
    torch.manual_seed(seed)
    call = specimen.plain_call or specimen.call
    prediction = full_graph(specimen.model, poses, combination, call=call)
    return _trained(specimen, combination, prediction, loss)


def train_by_group(
    specimen: Specimen,
    make_combination: MakeCombination,
    loss: Loss,
    count: int,
    accumulator: Any,
    *,
    seed: int = 3,
    **options: Any,
) -> Trained:
    combination = moved(make_combination(), specimen)
    poses = specimen.make_poses(count)
    scorer = gradhooks.MultiPose(
        specimen.model, combination, accumulator=accumulator, **{"call": specimen.call, **options}
    )
    torch.manual_seed(seed)
    return _trained(specimen, combination, scorer(poses), loss)


def moved(combination: Any, specimen: Specimen) -> Any:
    """The combination on the specimen's device."""
    device = next(iter([*specimen.model.parameters(), *specimen.outside.values()])).device
    return combination.to(device) if isinstance(combination, nn.Module) else combination


def _trained(specimen: Specimen, combination: Any, prediction: gradhooks.MultiPosePrediction, loss: Loss) -> Trained:
    loss(prediction).backward()
    return Trained(
        prediction=(prediction.combined.detach().clone(), prediction.per_pose.detach().clone()),
        gradients=gradients_of(leaves_of(specimen, combination)),
        buffers={name: buffer.clone() for name, buffer in specimen.model.named_buffers()},
        random_state=torch.get_rng_state(),
    )


def distances(found: Gradients, expected: Gradients, noise: float = 1e-4) -> dict[str, float]:
    """Each gradient's distance from the expected one, relative to its size.

    A gradient below `noise` times the largest of the model (the bias before a normalisation) is no better known than
    the large ones, and counts as if it were that large. Below `NOTHING` it counts as zero.
    """
    largest = max((_size(gradient) for gradient in expected.values() if gradient is not None), default=0.0)
    return {
        name: _distance(found[name], gradient, floor=max(noise * largest, NOTHING))
        for name, gradient in expected.items()
        if gradient is not None
    }


def _distance(found: Tensor | None, expected: Tensor, floor: float) -> float:
    assert found is not None
    if not bool(torch.isfinite(_dense(expected)).all()):
        return 0.0 if torch.equal(_dense(found).isnan(), _dense(expected).isnan()) else float("inf")
    difference = _size(_dense(found) - _dense(expected))
    return 0.0 if difference == 0 else difference / max(_size(expected), floor)


def _dense(gradient: Tensor) -> Tensor:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient.to(torch.complex128 if gradient.is_complex() else torch.float64)


def _size(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(_dense(gradient)))


# What is so small comes of poses that do not matter: all numbers of the zoo are of order 1.
NOTHING = 1e-9


def assert_same_form(found: Gradients, expected: Gradients) -> None:
    """The same gradients are there, of the same shape, dtype, layout and strides."""
    assert {name: _form(gradient) for name, gradient in found.items()} == {
        name: _form(gradient) for name, gradient in expected.items()
    }


def _form(gradient: Tensor | None) -> Any:
    if gradient is None:
        return None
    return tuple(gradient.shape), gradient.dtype, gradient.layout, gradient.device, _strides(gradient)


def _strides(gradient: Tensor) -> Any:
    # How one walks along an axis of length 1 means nothing.
    if gradient.is_sparse:
        return None
    return [stride for stride, length in zip(gradient.stride(), gradient.shape, strict=True) if length > 1]


def assert_same_gradients(found: Gradients, expected: Gradients, tolerance: float = 1e-12) -> None:
    """Equal in form, and in value to `tolerance` relative to the size of each."""
    assert_same_form(found, expected)
    too_far = {name: distance for name, distance in distances(found, expected).items() if not distance <= tolerance}
    assert not too_far, f"gradients further than {tolerance} from the full graph's: {too_far}"


def assert_bit_equal(found: Gradients, expected: Gradients) -> None:
    assert_same_form(found, expected)
    differing = [
        name for name, gradient in expected.items() if gradient is not None and not _equal(found[name], gradient)
    ]
    assert not differing, f"gradients that differ in some bit: {differing}"


def _equal(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.equal(_dense(found), _dense(expected))


def assert_same_training(found: Trained, expected: Trained, tolerance: float = 1e-12) -> None:
    """Predictions, gradients, buffers and random state are the full graph's."""
    for of_group, of_full_graph in zip(found.prediction, expected.prediction, strict=True):
        torch.testing.assert_close(of_group, of_full_graph, rtol=tolerance, atol=tolerance)
    assert_same_gradients(found.gradients, expected.gradients, tolerance)
    assert found.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        assert torch.equal(found.buffers[name], buffer), name
    assert torch.equal(found.random_state, expected.random_state), "global random state"

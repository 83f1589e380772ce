"""A declaration is checked while it is used: a wrong one costs time and a warning, never a gradient."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from model_zoo import Place, Specimen, build, mlp
from torch import Tensor, nn
from training_reference import (
    COMBINATIONS,
    assert_same_gradients,
    distances,
    gradients_of,
    leaves_of,
    of_both,
    of_combined,
    train_by_full_graph,
)

import gradhooks
from gradhooks import StreamWeights
from gradhooks.errors import CombinationError, GradhooksWarning

Declare = Callable[[Tensor], StreamWeights | None]


@contextmanager
def gradhooks_warnings() -> Iterator[list[str]]:
    """The messages of every `GradhooksWarning`; any other warning is an error."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(warning.message) for warning in caught if warning.category is GradhooksWarning)
    assert len(messages) == len(caught), [str(warning.message) for warning in caught]


# -- wrong ----------------------------------------------------------------------------------------------------------

TEMPERATURE = 0.7


class Thermal(gradhooks.Combination):
    """A thermal average with somebody's declaration for it."""

    def __init__(self, declare: Declare) -> None:
        super().__init__()
        self.declare = declare

    def forward(self, predictions: Tensor) -> Tensor:
        return (torch.softmax(-predictions / TEMPERATURE, 0) * predictions).sum(0)

    def stream_weights(self, predictions: Tensor) -> StreamWeights | None:
        return self.declare(predictions)


def right(y: Tensor) -> StreamWeights:
    return StreamWeights(-y / TEMPERATURE, y / TEMPERATURE)


def one_wrong(value: float) -> Declare:
    """The log-weight of every pose above the middle becomes `value`."""

    def declare(y: Tensor) -> StreamWeights:
        return StreamWeights(torch.where(y > 0.1, value, -y / TEMPERATURE), y / TEMPERATURE)

    return declare


def feature_of_one(value: float) -> Declare:
    def declare(y: Tensor) -> StreamWeights:
        return StreamWeights(-y / TEMPERATURE, torch.where(y > 0.1, value, y / TEMPERATURE))

    return declare


WRONG: dict[str, Declare] = {
    "temperature": lambda y: StreamWeights(-y / 0.9, y / 0.9),
    "temperature by a hair": lambda y: StreamWeights(-y / (TEMPERATURE * (1 + 1e-8)), y / TEMPERATURE),
    "sign": lambda y: StreamWeights(y / TEMPERATURE, y / TEMPERATURE),
    "steep": lambda y: StreamWeights(-300 * y, y / TEMPERATURE),
    "steep the wrong way": lambda y: StreamWeights(300 * y, y / TEMPERATURE),
    "constant": lambda _: StreamWeights(),
    "constant weights": lambda y: StreamWeights(torch.zeros_like(y)),
    "missing feature": lambda y: StreamWeights(-y / TEMPERATURE),
    "missing weights": lambda y: StreamWeights(features=y),
    "another feature": lambda y: StreamWeights(-y / TEMPERATURE, y.square()),
    "weight of one": one_wrong(0.3),
    "weight of one nan": one_wrong(math.nan),
    "weight of one inf": one_wrong(math.inf),
    "weight of one -inf": one_wrong(-math.inf),
    "feature of one": feature_of_one(0.3),
    "feature of one nan": feature_of_one(math.nan),
    "feature of one inf": feature_of_one(math.inf),
    "all nan": lambda y: StreamWeights(torch.full_like(y, math.nan)),
    "all inf": lambda y: StreamWeights(torch.full_like(y, math.inf)),
    "all -inf": lambda y: StreamWeights(torch.full_like(y, -math.inf)),
    "all features nan": lambda y: StreamWeights(-y / TEMPERATURE, torch.full_like(y, math.nan)),
    "all features inf": lambda y: StreamWeights(-y / TEMPERATURE, torch.full_like(y, math.inf)),
}


@pytest.mark.parametrize("loss", [of_combined, of_both], ids=["combined", "both"])
@pytest.mark.parametrize("name", ["plain_mlp", "used_by_some_poses", "tied_weights"])
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_declaration(mistake: str, name: str, loss: Any, double: Place) -> None:
    specimen = build(name, double)
    scorer = gradhooks.MultiPose(specimen.model, Thermal(WRONG[mistake]), accumulator="stream")
    with gradhooks_warnings() as before_the_backward:
        prediction = scorer(specimen.make_poses(6))
    assert before_the_backward == []
    with gradhooks_warnings() as messages:
        loss(prediction).backward()
    expected = train_by_full_graph(build(name, double), lambda: Thermal(right), loss, 6)
    assert_same_gradients(gradients_of(leaves_of(specimen, None)), expected.gradients)
    (message,) = messages
    assert message.startswith("combination Thermal: its stream_weights do not explain")
    assert scorer.report.recomputed > 0


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-10, 1e-13, 1e-16])
def test_a_mistake_of_any_size_is_explained_or_recomputed(size: float, double: Place) -> None:
    specimen = build("plain_mlp", double)
    wrong = Thermal(lambda y: StreamWeights(-y / TEMPERATURE + size * torch.sin(9 * y), y / TEMPERATURE))
    with gradhooks_warnings() as messages:
        of_combined(gradhooks.MultiPose(specimen.model, wrong, accumulator="stream")(specimen.make_poses(7))).backward()
    expected = train_by_full_graph(build("plain_mlp", double), lambda: Thermal(right), of_combined, 7)
    assert_same_gradients(gradients_of(leaves_of(specimen, None)), expected.gradients)
    assert bool(messages) == (size > 1e-12)


def test_one_warning_for_each_backward(double: Place) -> None:
    specimen = build("plain_mlp", double)
    scorer = gradhooks.MultiPose(specimen.model, Thermal(WRONG["sign"]), accumulator="stream")
    first, second = (scorer(specimen.make_poses(count)).combined.sum() for count in (5, 6))
    with gradhooks_warnings() as messages:
        first.backward(retain_graph=True)
    assert len(messages) == 1
    with gradhooks_warnings() as messages:
        first.backward()
    assert len(messages) == 1
    assert "of 5 poses" in messages[0]
    with gradhooks_warnings() as messages:
        second.backward()
    assert len(messages) == 1
    assert "of 6 poses" in messages[0]


def test_the_warning_counts_the_poses(double: Place) -> None:
    # A hundred right ones: what the fit gives the one that is wrong is lost in its residual.
    specimen = build("plain_mlp", double)
    poses = list(double.randn(40, 4))
    with torch.no_grad():
        highest = max(specimen.model(pose).item() for pose in poses)

    def declare(y: Tensor) -> StreamWeights:
        return StreamWeights(torch.where(y >= highest, -math.inf, -y / TEMPERATURE), y / TEMPERATURE)

    scorer = gradhooks.MultiPose(specimen.model, Thermal(declare), accumulator="stream")
    with gradhooks_warnings() as messages:
        of_combined(scorer(poses)).backward()
    (message,) = messages
    assert "coefficients of 1 of 40 poses" in message
    assert scorer.report.recomputed == 1


@pytest.mark.parametrize("mistake", WRONG)
def test_auto_and_recompute_owe_nothing_to_a_declaration(mistake: str, double: Place) -> None:
    for accumulator in ("auto", "recompute", "store"):
        specimen = build("plain_mlp", double)
        scorer = gradhooks.MultiPose(specimen.model, Thermal(WRONG[mistake]), accumulator=accumulator)
        with gradhooks_warnings() as messages:
            of_combined(scorer(specimen.make_poses(6))).backward()
        expected = train_by_full_graph(build("plain_mlp", double), lambda: Thermal(right), of_combined, 6)
        assert_same_gradients(gradients_of(leaves_of(specimen, None)), expected.gradients)
        assert len(messages) == (scorer.report.accumulator == "stream")


@pytest.mark.parametrize(
    ("declare", "found"),
    [
        (lambda y: StreamWeights(y.sum()), r"got \(\)"),
        (lambda y: StreamWeights(y.repeat(2)), r"got \(2,\)"),
        (lambda y: StreamWeights(y, y.repeat(2)), r"and \(2, 1\)"),
        (lambda y: StreamWeights(y, y.view(1, -1, 1)), r"and \(1, 1, 1\)"),
    ],
    ids=["no axis", "too many", "too many features", "too many axes"],
)
def test_a_declaration_of_the_wrong_shape(declare: Declare, found: str, double: Place) -> None:
    specimen = build("plain_mlp", double)
    scorer = gradhooks.MultiPose(specimen.model, Thermal(declare), accumulator="stream")
    with pytest.raises(CombinationError, match=rf"combination Thermal: .* {found}"):
        scorer(specimen.make_poses(3))


def test_a_declaration_that_changes_its_number_of_features(double: Place) -> None:
    specimen = build("plain_mlp", double)
    calls: list[int] = []

    def declare(y: Tensor) -> StreamWeights:
        calls.append(len(y))
        return StreamWeights(-y, y.unsqueeze(1).expand(-1, min(len(calls), 2)))

    scorer = gradhooks.MultiPose(specimen.model, Thermal(declare), accumulator="stream")
    with pytest.raises(CombinationError, match="combination Thermal"):
        scorer(specimen.make_poses(3))


def test_a_declaration_for_some_poses_only(double: Place) -> None:
    specimen = build("plain_mlp", double)
    calls: list[int] = []

    def declare(y: Tensor) -> StreamWeights | None:
        calls.append(len(y))
        return right(y) if len(calls) < 3 else None

    scorer = gradhooks.MultiPose(specimen.model, Thermal(declare), accumulator="stream")
    with pytest.raises(
        CombinationError, match=r"combination Thermal: .* Declare the same number of features for every pose"
    ):
        scorer(specimen.make_poses(4))


# -- right ----------------------------------------------------------------------------------------------------------


class WeightedSum(gradhooks.Combination):
    """`h = sum_i g_i y_i` with the caller's numbers, positive ones."""

    def forward(self, predictions: Tensor, shares: Tensor) -> Tensor:
        return torch.einsum("n, n ... -> ...", shares, predictions)

    def stream_weights(self, predictions: Tensor, shares: Tensor) -> StreamWeights:
        del predictions
        return StreamWeights(shares.log())


class SignedSum(WeightedSum):
    """The same, with any numbers."""

    def stream_weights(self, predictions: Tensor, shares: Tensor) -> StreamWeights:
        del predictions
        return StreamWeights(features=shares)


class NoisyOr(gradhooks.Combination):
    """`h = 1 - prod_i (1 - p_i)`, with `dh/dp_i = (1 - h) / (1 - p_i)`."""

    def forward(self, predictions: Tensor) -> Tensor:
        return -torch.expm1(torch.log1p(-predictions).sum(0))

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights(-torch.log1p(-predictions))


class LinearSoftmax(gradhooks.Combination):
    """`h = sum_i p_i^2 / sum_i p_i`, with `dh/dp_i = (2 p_i - h) / sum_j p_j`."""

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.square().sum(0) / predictions.sum(0)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights(features=predictions)


class GeneralisedMean(gradhooks.Combination):
    """`h = (mean_i p_i^r)^(1/r)`, with `dh/dp_i = h^(1 - r) p_i^(r - 1) / N`."""

    def __init__(self, power: float = 3.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.pow(self.power).mean(0).pow(1 / self.power)

    def stream_weights(self, predictions: Tensor) -> StreamWeights:
        return StreamWeights((self.power - 1) * predictions.log())


RIGHT: dict[str, Callable[[], gradhooks.Combination]] = {
    "mean": gradhooks.combinations.Mean,
    "min": gradhooks.combinations.Min,
    "max of scale 1": lambda: gradhooks.combinations.Max(scale=1.0),
    "boltzmann": gradhooks.combinations.Boltzmann,
    "hot boltzmann": lambda: gradhooks.combinations.Boltzmann(50.0),
    "noisy-or": NoisyOr,
    "linear softmax": LinearSoftmax,
    "generalised mean": GeneralisedMean,
    "harmonic mean": lambda: GeneralisedMean(-1.0),
    "thermal": lambda: Thermal(right),
}


class Probability(nn.Module):
    """Predicts a number between 0 and 1."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.sharpness = sharpness

    def forward(self, pose: Tensor) -> Tensor:
        return torch.sigmoid(self.sharpness * self.net(pose))


def probabilities(place: Place, count: int, sharpness: float = 3.0, seed: int = 11) -> Specimen:
    torch.manual_seed(seed)
    model = Probability(sharpness).to(place.device, place.dtype)
    poses = list(place.randn(count, 4))
    return Specimen(model, lambda wanted: poses[:wanted])


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("loss", [of_combined, of_both], ids=["combined", "both"])
@pytest.mark.parametrize("combination", RIGHT)
def test_a_right_declaration_is_exact(combination: str, loss: Any, count: int, double: Place) -> None:
    specimen = probabilities(double, count)
    scorer = gradhooks.MultiPose(specimen.model, RIGHT[combination](), accumulator="stream")
    with gradhooks_warnings() as messages:
        loss(scorer(specimen.make_poses(count))).backward()
    expected = train_by_full_graph(probabilities(double, count), RIGHT[combination], loss, count)
    assert_same_gradients(gradients_of(leaves_of(specimen, None)), expected.gradients)
    assert messages == []
    assert scorer.report.recomputed == (0 if loss is of_combined else count)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", ["float32", "float64"])
@pytest.mark.parametrize("combination", RIGHT)
def test_a_right_declaration_is_never_doubted(
    combination: str, width: str, seed: int, single: Place, double: Place
) -> None:
    place = single if width == "float32" else double
    for count, sharpness in ((2, 1.0), (5, 3.0), (16, 0.1), (16, 10.0)):
        specimen = probabilities(place, count, sharpness, seed)
        scorer = gradhooks.MultiPose(specimen.model, RIGHT[combination](), accumulator="stream")
        with gradhooks_warnings() as messages:
            of_combined(scorer(specimen.make_poses(count))).backward()
        assert messages == [], (count, sharpness)
        assert scorer.report.recomputed == 0


@pytest.mark.parametrize("width", ["float32", "float64"])
@pytest.mark.parametrize(
    ("combination", "positive"), [(WeightedSum(), True), (SignedSum(), False)], ids=["positive", "any sign"]
)
def test_sums_with_the_callers_numbers(
    combination: WeightedSum, positive: bool, width: str, single: Place, double: Place
) -> None:
    place = single if width == "float32" else double
    specimen, plain = (probabilities(place, 9) for _ in range(2))
    shares = place.randn(9).exp() if positive else place.randn(9)
    scorer = gradhooks.MultiPose(specimen.model, combination, accumulator="stream")
    with gradhooks_warnings() as messages:
        scorer(specimen.make_poses(9), shares=shares).combined.sum().backward()
    predictions = torch.stack([plain.model(pose) for pose in plain.make_poses(9)])
    combination(predictions, shares).sum().backward()
    assert messages == []
    assert scorer.report.recomputed == 0
    tolerance = 1e-12 if width == "float64" else 2e-5
    assert_same_gradients(
        gradients_of(leaves_of(specimen, None)), gradients_of(leaves_of(plain, None)), tolerance=tolerance
    )


@pytest.mark.parametrize("combination", ["min", "boltzmann", "noisy-or", "linear softmax"])
def test_chunks_are_declared_together(combination: str, double: Place) -> None:
    specimen = probabilities(double, 7)
    scorer = gradhooks.MultiPose(
        specimen.model, RIGHT[combination](), accumulator="stream", chunk_size=3, collate=torch.stack
    )
    with gradhooks_warnings() as messages:
        of_combined(scorer(specimen.make_poses(7))).backward()
    expected = train_by_full_graph(probabilities(double, 7), RIGHT[combination], of_combined, 7)
    assert_same_gradients(gradients_of(leaves_of(specimen, None)), expected.gradients)
    assert messages == []
    assert scorer.report.recomputed == 0


# -- energies -------------------------------------------------------------------------------------------------------


class Energy(nn.Module):
    """About -1e4, of which a few units vary: the total energy of a molecule in kcal/mol."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 16, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return 3 * self.net(pose) - 1e4


def molecule(place: Place, seed: int) -> Specimen:
    torch.manual_seed(seed)
    model = Energy().to(place.device, place.dtype)
    poses = list(place.randn(12, 4))
    return Specimen(model, lambda count: poses[:count])


@pytest.mark.parametrize("combination", ["boltzmann", "boltzmann learnable", "min", "min of scale 1"])
@pytest.mark.parametrize("seed", range(5))
def test_energies_far_from_zero(seed: int, combination: str, single: Place, double: Place) -> None:
    def loss(prediction: gradhooks.MultiPosePrediction) -> Tensor:
        return (prediction.combined + 1e4).square().sum()

    specimen = molecule(single, seed)
    scorer = gradhooks.MultiPose(specimen.model, COMBINATIONS[combination](), accumulator="stream")
    with gradhooks_warnings() as messages:
        loss(scorer(specimen.make_poses(12))).backward()
    assert messages == []
    truth = train_by_full_graph(molecule(double, seed), COMBINATIONS[combination], loss, 12).gradients
    full = train_by_full_graph(molecule(single, seed), COMBINATIONS[combination], loss, 12).gradients
    own = distances(full, truth, noise=0.1)
    rounding = 8 * torch.finfo(torch.float32).eps
    found = distances(gradients_of(leaves_of(specimen, scorer.combination)), truth, noise=0.1)
    too_far = {leaf: (found[leaf], own[leaf]) for leaf in found if not found[leaf] <= 2 * own[leaf] + rounding}
    assert not too_far, f"(distance, the full graph's): {too_far}"

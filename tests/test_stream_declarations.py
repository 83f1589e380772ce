"""With a right declaration, "stream" gives the gradients of the full graph without a second run or a warning."""

import pytest
import torch
from model_zoo import ModelCase, TensorFactory, mlp
from seeding import manual_seed
from stream_combinations import DECLARED, gradhooks_warnings
from torch import Tensor, nn
from training_reference import (
    COMBINATIONS,
    LOSSES,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_combined,
    relative_errors,
    train_full_graph,
    trained_leaves,
)

import gradhooks
from gradhooks import StreamWeights


class Probability(nn.Module):
    """Predicts a number between 0 and 1."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)
        self.sharpness = sharpness

    def forward(self, pose: Tensor) -> Tensor:
        return torch.sigmoid(self.sharpness * self.net(pose))


def probabilities(factory: TensorFactory, count: int, sharpness: float = 3.0, seed: int = 11) -> ModelCase:
    manual_seed(seed)
    model = Probability(sharpness).to(factory.device, factory.dtype)
    poses = list(factory.randn(count, 4))
    return ModelCase(model, lambda count: poses[:count])


@pytest.mark.parametrize("loss", ["combined", "both"])
@pytest.mark.parametrize("combination", DECLARED)
def test_a_right_declaration_is_exact(combination: str, loss: str, double: TensorFactory) -> None:
    for count in (1, 2, 7, 40):
        case = probabilities(double, count)
        scorer = gradhooks.MultiPose(case.model, DECLARED[combination](), accumulator="stream")
        with gradhooks_warnings() as messages:
            LOSSES[loss](scorer(case.make_poses(count))).backward()
        expected = train_full_graph(probabilities(double, count), DECLARED[combination], LOSSES[loss], count)
        with case_label(count):
            assert_same_gradients(gradients_of(trained_leaves(case, None)), expected.gradients)
        assert messages == [], count
        assert scorer.report.recomputed == (0 if loss == "combined" else count), count


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("combination", DECLARED)
def test_a_right_declaration_never_gives_a_warning(
    combination: str, dtype: str, single: TensorFactory, double: TensorFactory
) -> None:
    factory = single if dtype == "float32" else double
    for seed in range(4):
        for count, sharpness in ((2, 1.0), (5, 3.0), (16, 0.1), (16, 10.0)):
            case = probabilities(factory, count, sharpness, seed)
            scorer = gradhooks.MultiPose(case.model, DECLARED[combination](), accumulator="stream")
            with gradhooks_warnings() as messages:
                loss_on_combined(scorer(case.make_poses(count))).backward()
            assert messages == [], (seed, count, sharpness)
            assert scorer.report.recomputed == 0, (seed, count, sharpness)


class WeightedSum(gradhooks.Combination):
    """`h = sum_i g_i y_i` with positive `shares` g_i, an argument of the call."""

    def forward(self, predictions: Tensor, shares: Tensor) -> Tensor:
        return torch.einsum("n, n ... -> ...", shares, predictions)

    def stream_weights(self, predictions: Tensor, shares: Tensor) -> StreamWeights:
        del predictions
        return StreamWeights(shares.log())


class SignedSum(WeightedSum):
    """`h = sum_i g_i y_i` with `shares` g_i of any sign."""

    def stream_weights(self, predictions: Tensor, shares: Tensor) -> StreamWeights:
        del predictions
        return StreamWeights(features=shares)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("combination", "positive"), [(WeightedSum(), True), (SignedSum(), False)], ids=["positive", "any sign"]
)
def test_sums_with_shares_of_the_caller(
    combination: WeightedSum, positive: bool, dtype: str, single: TensorFactory, double: TensorFactory
) -> None:
    factory = single if dtype == "float32" else double
    case, plain = (probabilities(factory, 9) for _ in range(2))
    shares = factory.randn(9).exp() if positive else factory.randn(9)
    scorer = gradhooks.MultiPose(case.model, combination, accumulator="stream")
    with gradhooks_warnings() as messages:
        scorer(case.make_poses(9), shares=shares).combined.sum().backward()
    predictions = torch.stack([plain.model(pose) for pose in plain.make_poses(9)])
    combination(predictions, shares).sum().backward()
    assert messages == []
    assert scorer.report.recomputed == 0
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    assert_same_gradients(
        gradients_of(trained_leaves(case, None)), gradients_of(trained_leaves(plain, None)), tolerance=tolerance
    )


@pytest.mark.parametrize("combination", ["min", "boltzmann", "noisy-or", "linear softmax"])
def test_chunks_are_declared_at_once(combination: str, double: TensorFactory) -> None:
    case = probabilities(double, 7)
    scorer = gradhooks.MultiPose(
        case.model, DECLARED[combination](), accumulator="stream", chunk_size=3, collate=torch.stack
    )
    with gradhooks_warnings() as messages:
        loss_on_combined(scorer(case.make_poses(7))).backward()
    expected = train_full_graph(probabilities(double, 7), DECLARED[combination], loss_on_combined, 7)
    assert_same_gradients(gradients_of(trained_leaves(case, None)), expected.gradients)
    assert messages == []
    assert scorer.report.recomputed == 0


# -- energies -------------------------------------------------------------------------------------------------------


class Energy(nn.Module):
    """Predicts about -1e4 and varies by a few units, as the total energy of a molecule in kcal/mol."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 16, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return 3 * self.net(pose) - 1e4


def molecule(factory: TensorFactory, seed: int) -> ModelCase:
    manual_seed(seed)
    model = Energy().to(factory.device, factory.dtype)
    poses = list(factory.randn(12, 4))
    return ModelCase(model, lambda count: poses[:count])


@pytest.mark.parametrize("combination", ["boltzmann", "boltzmann learnable", "min", "min of scale 1"])
@pytest.mark.parametrize("seed", range(5))
def test_energies_far_from_zero(seed: int, combination: str, single: TensorFactory, double: TensorFactory) -> None:
    def loss(prediction: gradhooks.MultiPosePrediction) -> Tensor:
        return (prediction.combined + 1e4).square().sum()

    case = molecule(single, seed)
    scorer = gradhooks.MultiPose(case.model, COMBINATIONS[combination](), accumulator="stream")
    with gradhooks_warnings() as messages:
        loss(scorer(case.make_poses(12))).backward()
    assert messages == []
    truth = train_full_graph(molecule(double, seed), COMBINATIONS[combination], loss, 12).gradients
    full = train_full_graph(molecule(single, seed), COMBINATIONS[combination], loss, 12).gradients
    full_graph_errors = relative_errors(full, truth, noise=0.1)
    rounding = 8 * torch.finfo(torch.float32).eps
    errors = relative_errors(gradients_of(trained_leaves(case, scorer.combination)), truth, noise=0.1)
    too_far = {
        leaf: (error, full_graph_errors[leaf])
        for leaf, error in errors.items()
        if not error <= 2 * full_graph_errors[leaf] + rounding
    }
    assert not too_far, f"(error, error of the full graph): {too_far}"

from collections.abc import Callable
from typing import Any

import gradhooks_mil
import pytest
import torch

from gradhooks import Combination, MultiPose
from gradhooks.errors import CombinationError
from gradhooks.testing import parametrize_with_checks

torch.set_num_threads(1)

Y = torch.tensor([-2.0, 0.5, 1.0, -0.3], dtype=torch.float64)
P = Y.sigmoid()


@parametrize_with_checks(
    [
        "noisy_or",
        "generalized_mean",
        "linear_softmax",
        "power_pooling",
        "top_k_mean",
        "log_mean_exp",
        "attention",
        "gated_attention",
        gradhooks_mil.Attention(features=1),
        gradhooks_mil.GatedAttention(features=1),
        gradhooks_mil.GatedAttention(features=3, hidden=5, return_attention=True),
        gradhooks_mil.GeneralizedMean(0.5),
        gradhooks_mil.LogMeanExp(-20.0),
    ]
)
def test_conformance(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


@pytest.mark.parametrize(
    ("combination", "expected"),
    [
        (gradhooks_mil.NoisyOr(), (1 - (1 - P).prod()).logit()),
        (gradhooks_mil.GeneralizedMean(1.0), P.mean().logit()),
        (gradhooks_mil.GeneralizedMean(3.0), (P**3).mean().pow(1 / 3).logit()),
        (gradhooks_mil.LinearSoftmax(), (P.square().sum() / P.sum()).logit()),
        (gradhooks_mil.PowerPooling(2.5), ((P**3.5).sum() / (P**2.5).sum()).logit()),
        (gradhooks_mil.TopKMean(2), torch.tensor(0.75, dtype=torch.float64)),
        (gradhooks_mil.TopKMean(9), Y.mean()),
        (gradhooks_mil.LogMeanExp(2.0), (2 * Y).exp().mean().log() / 2),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.nn.Module) else "",
)
def test_formula(combination: Combination, expected: torch.Tensor) -> None:
    torch.testing.assert_close(combination.double()(Y), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [gradhooks_mil.NoisyOr, gradhooks_mil.GeneralizedMean, gradhooks_mil.LinearSoftmax])
@pytest.mark.parametrize("logit", [-700.0, -45.0, -35.0, -0.1, 20.0, 35.0, 45.0, 700.0])
def test_bag_of_one_instance(make: Callable[[], Combination], logit: float) -> None:
    y = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    combined = make()(y)
    combined.backward()
    torch.testing.assert_close(combined, y[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.grad, torch.ones_like(y), rtol=1e-12, atol=0)


def test_attention_with_equal_scores_is_the_mean() -> None:
    attention = gradhooks_mil.GatedAttention(features=3)
    torch.nn.init.zeros_(attention.score.weight)
    embeddings = torch.randn(7, 3)
    torch.testing.assert_close(attention(embeddings), embeddings.mean(0))


def test_attention_refuses_embeddings_of_another_length() -> None:
    with pytest.raises(CombinationError, match=r"of 3 features, got 4; create it with Attention\(features=4\)"):
        gradhooks_mil.Attention(features=3)(torch.randn(5, 4))


@pytest.mark.parametrize("name", ["attention", "gated_attention"])
def test_attention_to_each_pose(name: str) -> None:
    options = {"features": 3, "return_attention": True}
    scorer = MultiPose(torch.nn.Linear(2, 3), name, combination_options=options)
    groups = torch.tensor([1, 0, 1, 1, 0])
    prediction = scorer(torch.randn(5, 2), groups=groups)
    for group in range(2):
        attention = prediction.attention[groups == group]
        torch.testing.assert_close(attention.sum(), torch.tensor(1.0))
        torch.testing.assert_close(attention @ prediction.per_pose[groups == group], prediction.combined[group])


def test_attention_of_single_numbers() -> None:
    assert gradhooks_mil.Attention(features=1)(torch.randn(5)).shape == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: gradhooks_mil.TopKMean(0),
        lambda: gradhooks_mil.LogMeanExp(0.0),
        lambda: gradhooks_mil.GeneralizedMean(-1.0),
        lambda: gradhooks_mil.PowerPooling(0.0),
    ],
)
def test_invalid_options(make: Callable[[], Combination]) -> None:
    with pytest.raises(CombinationError, match="must be"):
        make()


def test_top_k_mean_reruns_k_poses() -> None:
    scorer = MultiPose(torch.nn.Linear(2, 1), gradhooks_mil.TopKMean(2), memory=0)
    scorer(torch.randn(20, 2).unbind()).combined.sum().backward()
    assert scorer.report.recomputed == 2


BAGS = torch.tensor([2, 0, 2, 0, 0, 3, 2])


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 9])
def test_top_k_mean_of_bags(k: int, shape: tuple[int, ...]) -> None:
    logits = torch.randn(7, *shape, dtype=torch.float64).requires_grad_()
    groups = torch.tensor([1, 0, 1, 0, 0, 2, 1])
    combination = gradhooks_mil.TopKMean(k)
    combined = combination.forward_groups(logits, groups, 3)
    expected = torch.stack([combination(logits[groups == number]) for number in range(3)])
    torch.testing.assert_close(combined, expected)
    gradients = [torch.autograd.grad(result.sum(), logits)[0] for result in (combined, expected)]
    torch.testing.assert_close(*gradients)


def test_noisy_or_of_an_empty_bag_has_probability_zero() -> None:
    logits = torch.randn(7, dtype=torch.float64).requires_grad_()
    combined = gradhooks_mil.NoisyOr().forward_groups(logits, BAGS, 5)
    assert combined.sigmoid()[[1, 4]].tolist() == [0, 0]
    assert gradhooks_mil.NoisyOr()(logits[:0]).sigmoid().item() == 0
    combined[[0, 2, 3]].sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()

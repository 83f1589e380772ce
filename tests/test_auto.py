"""The accumulator "auto" learns from earlier groups which accumulator is cheapest, without a clock."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradhooks
from gradhooks.accumulators.auto import FORWARD_SHARE, INERTIA, Auto

COUNT = 10


def scorer_of(combination: Any) -> gradhooks.MultiPose[nn.Linear]:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return gradhooks.MultiPose(model, combination, memory=0)


def heights(significant_online: int, significant_final: int) -> Tensor:
    """Return poses for a sharp minimum, so many of which are significant when they run, and in the end."""
    early = torch.full((significant_online - significant_final,), 1.0)
    late = torch.full((significant_final,), 0.0)
    rest = torch.full((COUNT - significant_online,), 2.0)
    return torch.cat([early, late, rest]).unsqueeze(1)


def choices(scorer: gradhooks.MultiPose[Any], poses: Tensor, groups: int, *, direct: bool = False) -> list[str]:
    chosen = []
    for _ in range(groups):
        prediction = scorer(poses)
        (prediction.combined.sum() + (prediction.per_pose.sum() if direct else 0)).backward()
        chosen.append(scorer.report.accumulator)
    return chosen


@pytest.mark.parametrize(
    ("online", "final", "choice"),
    [(10, 10, "stream"), (4, 4, "stream"), (4, 3, "recompute"), (8, 1, "recompute"), (1, 1, "recompute")],
)
def test_the_cheaper_accumulator_is_chosen(online: int, final: int, choice: str) -> None:
    streamed = FORWARD_SHARE + online / COUNT * (1 - FORWARD_SHARE)
    recomputed = FORWARD_SHARE + final / COUNT
    assert choice == ("stream" if streamed * INERTIA <= recomputed else "recompute")
    scorer = scorer_of(gradhooks.combinations.Min(scale=100.0))
    chosen = choices(scorer, heights(online, final), groups=6)
    assert chosen[0] == "recompute"  # no earlier group
    assert set(chosen[1:]) == {choice}
    assert f"{online / COUNT:.0%} of the poses were significant when they ran" in scorer.report.reason


def test_what_the_loss_reads_directly_counts() -> None:
    # Streaming would run every pose again: 0.25 + 0.75 + 1 steps against 1.25.
    scorer = scorer_of(gradhooks.combinations.Min(scale=1.0))
    assert set(choices(scorer, torch.zeros(COUNT, 1), groups=4, direct=True)) == {"recompute"}
    assert "the loss read 100% directly" in scorer.report.reason


def test_equal_weights_are_streamed_at_once() -> None:
    scorer = scorer_of("mean")
    assert set(choices(scorer, torch.randn(COUNT, 1), groups=3)) == {"stream"}


class TokenScorer(nn.Sequential):
    """A pose has more tokens than the model has parameters, so that copies of the gradients fit beside few poses."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.chunk_sizes: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.chunk_sizes.append(len(tokens))
        return super().forward(tokens).mean((1, 2))


def test_chunks_of_a_stream_end_where_groups_do() -> None:
    model, poses, sorted_groups = TokenScorer(), torch.randn(40, 64, 8), torch.arange(4).repeat_interleave(10)
    scorer = gradhooks.MultiPose(model, "mean", memory="64KiB")
    for groups in (sorted_groups, sorted_groups, sorted_groups.flip(0)):
        scorer.zero_grad()
        del model.chunk_sizes[:]
        scorer(poses, groups=groups).combined.square().sum().backward()
        found = [parameter.grad for parameter in model.parameters()]
        ends = set(torch.tensor(model.chunk_sizes).cumsum(0).tolist())
        assert scorer.report.accumulator == "stream"
        assert max(model.chunk_sizes) > 1
        assert {10, 20} <= ends
        means = torch.stack([model(poses[groups == group]).mean() for group in range(4)])
        expected = torch.autograd.grad(means.square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, list(expected))


def test_the_choice_changes_only_for_a_clear_advantage() -> None:
    scorer = scorer_of(gradhooks.combinations.Min(scale=100.0))
    assert choices(scorer, heights(4, 4), groups=3)[-1] == "stream"
    # Both now cost 0.55: the choice stays.
    assert set(choices(scorer, heights(4, 3), groups=20)) == {"stream"}
    assert choices(scorer, heights(8, 1), groups=20)[-1] == "recompute"
    assert set(choices(scorer, heights(4, 3), groups=20)) == {"recompute"}


def test_a_copy_keeps_what_was_learned() -> None:
    scorer = scorer_of(gradhooks.combinations.Min(scale=100.0))
    choices(scorer, heights(4, 3), groups=3)
    accumulator: Any = scorer.accumulator
    for copied in (copy.deepcopy(accumulator), pickle.loads(pickle.dumps(accumulator))):  # noqa: S301
        assert isinstance(copied, Auto)
        assert vars(copied) == vars(accumulator)
        assert copied._shares.batches == 3


def test_each_pose_is_declared_once() -> None:
    class Counting(gradhooks.combinations.Boltzmann):
        def stream_weights(self, predictions: Tensor, weights: Tensor | None = None) -> Any:
            declared.append(len(predictions))
            return super().stream_weights(predictions, weights)

    declared: list[int] = []
    scorer = gradhooks.MultiPose(nn.Linear(1, 1), Counting(), memory=0)
    for _ in range(3):
        declared.clear()
        scorer(torch.randn(5, 1)).combined.sum().backward()
    assert scorer.report.accumulator == "stream"
    assert declared == [1, 1, 1, 1, 1, 5]  # and once all together, for what can be learned


@pytest.mark.parametrize(
    ("combination", "outputs", "accumulator", "reason"),
    [
        ("mean", 1, "stream", "all poses have the same weight"),
        ("min", 1, "recompute", "no earlier batch"),
        ("mean", 2, "recompute", "one number per prediction"),
        (torch.nn.Identity(), 1, "recompute", "declares no stream_weights"),
    ],
)
def test_the_report_says_why(combination: Any, outputs: int, accumulator: str, reason: str) -> None:
    scorer = gradhooks.MultiPose(nn.Linear(3, outputs), combination, memory=0)
    scorer([torch.randn(3) for _ in range(3)])
    assert scorer.report.accumulator == accumulator
    assert reason in scorer.report.reason


def test_an_option_that_the_chosen_accumulator_cannot_use_is_refused() -> None:
    class Sum(gradhooks.GradientCombination):
        def forward(self, predictions: Tensor) -> Tensor:
            return predictions.sum(0)

        def combine_gradients(self, gradients: Any, *_: Tensor) -> Any:
            return {name: rows.sum(0) for name, rows in gradients.items()}

    scorer = gradhooks.MultiPose(nn.Linear(3, 1), Sum(), tolerance=0.1)
    with pytest.raises(gradhooks.errors.CombinationError, match=r"leave out tolerance=0\.1"):
        scorer(torch.randn(4, 3))
    scorer.tolerance = None
    scorer(torch.randn(4, 3)).combined.sum().backward()
    assert scorer.report.reason == "the combination works on the gradients of the poses"

"""auto learns from earlier groups what is cheapest, and settles."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradhooks
from gradhooks.engine import stopwatch as timing
from gradhooks.accumulators.auto import TIMED, Auto

COUNT = 10


class Clock:
    """Stands for the real one: it goes on where the model says so."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0

    def perf_counter(self) -> float:
        self.asked += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


class Timed(nn.Module):
    """Takes `forward_seconds` of every second, and the rest in the backward."""

    def __init__(self, clock: Clock, forward_seconds: float) -> None:
        super().__init__()
        self.linear, self.clock, self.forward_seconds = nn.Linear(1, 1, bias=False), clock, forward_seconds
        nn.init.ones_(self.linear.weight)

    def forward(self, height: Tensor) -> Tensor:
        self.clock.now += self.forward_seconds
        prediction = self.linear(height)
        if prediction.requires_grad:
            prediction.register_hook(self.backward_takes)
        return prediction

    def backward_takes(self, gradient: Tensor) -> None:
        del gradient
        self.clock.now += 1 - self.forward_seconds


def heights(matter_when_they_came: int, matter_in_the_end: int) -> Tensor:
    """Poses for a sharp minimum, of which so many matter."""
    early = torch.full((matter_when_they_came - matter_in_the_end,), 1.0)
    late = torch.full((matter_in_the_end,), 0.0)
    rest = torch.full((COUNT - matter_when_they_came,), 2.0)
    return torch.cat([early, late, rest]).unsqueeze(1)


def chosen(scorer: gradhooks.MultiPose, poses: Tensor, groups: int) -> list[str]:
    choices = []
    for _ in range(groups):
        scorer(poses).combined.sum().backward()
        choices.append(scorer.report.accumulator)
    return choices


@pytest.mark.parametrize(("share", "choice"), [(0.1, "recompute"), (0.25, "recompute"), (0.6, "stream")])
def test_the_measured_forward_decides(share: float, choice: str, clock: Clock) -> None:
    # Streaming costs f + 0.4 (1 - f) of a step, recomputing f + 0.3.
    scorer = gradhooks.MultiPose(Timed(clock, share), gradhooks.combinations.Min(scale=100.0))
    choices = chosen(scorer, heights(4, 3), groups=20)
    assert choices[0] == "recompute"  # nothing is known
    assert set(choices[2:]) == {choice}  # settled, for good
    assert f"a forward without a graph was timed at {share:.0%} of a step" in scorer.report.reason


def test_after_some_groups_nobody_looks_at_the_clock(clock: Clock) -> None:
    scorer = gradhooks.MultiPose(Timed(clock, 0.1), gradhooks.combinations.Min(scale=100.0))
    chosen(scorer, heights(4, 3), groups=TIMED)
    assert clock.asked == 4 * TIMED
    chosen(scorer, heights(4, 3), groups=5)
    assert clock.asked == 4 * TIMED


def test_one_slow_first_group_does_not_decide(clock: Clock) -> None:
    model = Timed(clock, 5.0)  # as if a compiler had been busy
    scorer = gradhooks.MultiPose(model, gradhooks.combinations.Min(scale=100.0))
    choices = chosen(scorer, heights(4, 3), groups=1)
    model.forward_seconds = 0.1
    choices += chosen(scorer, heights(4, 3), groups=9)
    assert set(choices) == {"recompute"}


def test_a_larger_graphless_chunk_makes_recompute_cheaper(clock: Clock) -> None:
    # All poses matter: streaming costs 1, recomputing 1 + f.
    poses = torch.zeros(COUNT, 1)
    small = gradhooks.MultiPose(Timed(clock, 0.3), gradhooks.combinations.Min(scale=1.0))
    assert set(chosen(small, poses, groups=5)[1:]) == {"stream"}
    large = gradhooks.MultiPose(Timed(clock, 0.3), gradhooks.combinations.Min(scale=1.0), forward_chunk_size=9)
    assert set(chosen(large, poses, groups=5)) == {"recompute"}


def test_what_it_learned_is_copied(clock: Clock) -> None:
    scorer = gradhooks.MultiPose(Timed(clock, 0.6), gradhooks.combinations.Min(scale=100.0))
    chosen(scorer, heights(4, 3), groups=3)
    accumulator: Any = scorer.accumulator
    for copied in (copy.deepcopy(accumulator), pickle.loads(pickle.dumps(accumulator))):  # noqa: S301
        assert isinstance(copied, Auto)
        assert copied.forward_share == pytest.approx(0.6)


def test_each_pose_is_declared_once() -> None:
    class Counting(gradhooks.combinations.Boltzmann):
        def stream_weights(self, predictions: Tensor) -> Any:
            declared.append(len(predictions))
            return super().stream_weights(predictions)

    declared: list[int] = []
    scorer = gradhooks.MultiPose(nn.Linear(1, 1), Counting())
    for _ in range(3):
        declared.clear()
        scorer(torch.randn(5, 1)).combined.sum().backward()
    assert scorer.report.accumulator == "stream"
    assert declared == [1, 1, 1, 1, 1, 5]  # and all together, for what can be learned

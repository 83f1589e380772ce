"""Resuming: a run that goes on from a checkpoint has the bits of one that was not interrupted."""

import copy
from typing import Any

import pytest
import torch
from checkpoint_helpers import learnable_boltzmann, save_and_load
from torch import Tensor, nn

from gradhooks import MultiPose
from gradhooks.combinations import Min

STEPS = 7


class Run:
    """A training run of groups of random sizes, with dropout and skipped poses."""

    def __init__(self, combination: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1))
        made = learnable_boltzmann(0.5) if combination == "boltzmann" else Min(30.0) if combination == "min" else "mean"
        self.scorer = MultiPose(self.model, made, **options)
        self.optimizer = torch.optim.Adam(self.scorer.parameters(), lr=0.03)
        self.step_number = 0
        self.accumulators: list[str] = []

    def step(self) -> None:
        torch.manual_seed(100 + self.step_number)
        counts = torch.randint(2, 9, (4,))
        groups = torch.arange(4).repeat_interleave(counts)
        prediction = self.scorer(torch.randn(len(groups), 8), groups=groups)
        self.optimizer.zero_grad()
        prediction.combined.square().sum().backward()
        self.optimizer.step()
        self.accumulators.append(self.scorer.report.accumulator)
        self.step_number += 1

    def save(self) -> Any:
        states = {"model": self.scorer.state_dict(), "optimizer": self.optimizer.state_dict()}
        return save_and_load({**states, "step": self.step_number, "learned": self.scorer.learned}, weights_only=True)

    def resume(self, state: Any, *, learned: bool = True) -> None:
        self.scorer.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number = state["step"]
        if learned:
            self.scorer.learned = state["learned"]

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.scorer.parameters()]


def uninterrupted(combination: str, **options: Any) -> tuple[list[Any], Run]:
    """Return the states after each step, and the run. It saves nothing while it runs."""
    quiet, saving = Run(combination, **options), Run(combination, **options)
    states = []
    for _ in range(STEPS):
        quiet.step()
        saving.step()
        states.append(saving.save())
    assert all(map(torch.equal, quiet.weights(), saving.weights())), "saving has changed the run"
    return states, quiet


@pytest.mark.parametrize("combination", ["mean", "min", "boltzmann"])
@pytest.mark.parametrize("memory", [0, 3_000, "1GiB"])
def test_every_interruption_leaves_the_bits_as_they_are(combination: str, memory: str | int) -> None:
    states, expected = uninterrupted(combination, memory=memory)
    for state in states[:-1:2]:
        resumed = Run(combination, memory=memory)
        resumed.resume(state)
        while resumed.step_number < STEPS:
            resumed.step()
        assert resumed.accumulators == expected.accumulators[-len(resumed.accumulators) :]
        assert all(map(torch.equal, resumed.weights(), expected.weights())), state["step"]


@pytest.mark.parametrize("accumulator", ["stream", "recompute", "store"])
def test_a_fixed_accumulator_needs_the_state_dict_only(accumulator: str) -> None:
    options = {"accumulator": accumulator, "chunk_size": 2}
    states, expected = uninterrupted("boltzmann", **options)
    resumed = Run("boltzmann", **options)
    resumed.resume(states[2], learned=False)
    while resumed.step_number < STEPS:
        resumed.step()
    assert all(map(torch.equal, resumed.weights(), expected.weights()))


def test_learned_is_small_and_separate() -> None:
    run = Run("min", memory=3_000)
    assert run.scorer.learned == MultiPose(nn.Linear(1, 1)).learned
    for _ in range(3):
        run.step()
    learned = run.scorer.learned
    kept = copy.deepcopy(learned)
    other = Run("min", memory=3_000)
    other.scorer.learned = learned
    for _ in range(2):
        other.step()
        run.step()
    assert repr(learned) == repr(kept)
    fixed = Run("min", accumulator="recompute")
    fixed.scorer.learned = {**learned, "an entry of another version": 1}
    fixed.step()
    with pytest.raises(TypeError, match="learned must be what scorer"):
        fixed.scorer.learned = [1]  # type: ignore[assignment]
    assert list(run.scorer.state_dict())[:4] == list(run.model.state_dict())

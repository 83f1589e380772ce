"""Ways to train a reference model, side by side with plain steps and plain forwards."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.report import reference
from gradhooks.accumulators import Accumulator
from gradhooks.combination import Combination
from gradhooks.engine.model_call import call_model
from gradhooks.profiling.timing import in_turns, peak_of
from gradhooks.profiling.training_steps import all_ways
from gradhooks.profiling.undisturbed import undisturbed

# Steps of each way before it counts: `auto` has settled by then.
WARM_UP = 3
PLAIN = ("full graph", "checkpoint per pose")


class Found(NamedTuple):
    """Seconds by round, peak bytes, and poses that got a backward."""

    seconds: list[float]
    peak: int
    backwards: int


class Trial(NamedTuple):
    """A way, `"full graph"`, `"checkpoint per pose"` or an accumulator, with a combination and N poses."""

    way: str | Accumulator
    combination: Combination
    poses: int


class Bench:
    """Measures on one reference model.

    Args:
        name: The model.
        poses: N of the full graph.
        many: N of a long group, which is the N poses over and over; so many as a quarter are there without repetition.
        repeats: Rounds that count.
        device: Where.
    """

    def __init__(self, name: str, poses: int, many: int, repeats: int, device: torch.device | str) -> None:
        self.poses, self.many, self.repeats, self.device = poses, many, repeats, torch.device(device)
        self.model, self.group, self.spread = reference(name, max(poses, many // 4), device)

    def together(self, combination: Combination, *ways: str | Accumulator) -> dict[str, Found]:
        """What several ways need for one combination, by their names."""
        return self.found({str(way): Trial(way, combination, self.poses) for way in ways})

    def found(self, trials: Mapping[str, Trial]) -> dict[str, Found]:
        """What each trial needs, in turns with `"plain steps"` (N S) and `"forwards"` (N F) of N poses."""
        steps: dict[str, Callable[[], object]] = {"plain steps": self._plain_steps, "forwards": self._forwards}
        reports: dict[str, Callable[[], Any]] = {}
        for name, trial in trials.items():
            accumulators: Sequence[Any] = () if trial.way in PLAIN else (trial.way,)
            ways = all_ways(self.model, self._group(trial.poses), trial.combination, accumulators)
            way = ways[-1] if accumulators else ways[PLAIN.index(str(trial.way))]
            steps[name], reports[name] = partial(self._step, way.forward), way.report
        with undisturbed(self.model):
            for _ in range(WARM_UP):
                for step in steps.values():
                    step()
            peaks = [self._peak(step) for step in steps.values()]
            seconds = in_turns(list(steps.values()), self.repeats, self.device)
        counted = {name: report() for name, report in reports.items()}
        backwards = {name: 0 if report is None else report.backwards for name, report in counted.items()}
        return {
            name: Found(times, peak, backwards.get(name, 0))
            for name, times, peak in zip(steps, seconds, peaks, strict=True)
        }

    def _step(self, forward: Callable[[], Any]) -> None:
        self.model.zero_grad()
        forward().combined.sum().backward()

    def _plain_steps(self) -> None:
        """N S: each pose for itself, `.grad` adds up."""
        self.model.zero_grad()
        for pose in self.group[: self.poses]:
            call_model(self.model, pose).sum().backward()

    @torch.no_grad()
    def _forwards(self) -> None:
        """N F."""
        for pose in self.group[: self.poses]:
            call_model(self.model, pose)

    def _peak(self, step: Callable[[], object]) -> int:
        self.model.zero_grad()
        return peak_of(step, self.device)

    def gradient_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.model.parameters() if leaf.requires_grad)

    def step_peak(self, poses: int) -> int:
        """The peak of a plain step of the largest pose, gradients included, which join those of the step before."""
        with undisturbed(self.model):
            self._plain_steps()
            later = [
                peak_of(lambda pose=pose: call_model(self.model, pose).sum().backward(), self.device)  # type: ignore[misc]
                for pose in self._group(poses)
            ]
        return self.gradient_bytes() + max(later)

    def _group(self, poses: int) -> list[Any]:
        if poses <= len(self.group):
            return self.group[:poses]
        return [self.group[place % self.poses] for place in range(poses)]

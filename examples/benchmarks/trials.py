"""Run training steps of a reference model, interleaved with plain steps and plain forwards of its poses."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from models import reference

from gradhooks import Combination
from gradhooks.options import call_model
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.preserved_state import preserved_state
from gradhooks.profiling.timing import interleaved_seconds
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.profiling.training_steps import TrainingStep, checkpoint_step, full_graph_step, multipose_step

WARM_UP_STEPS = 3  # in which `auto` settles
BASELINES = {"full graph": full_graph_step, "checkpoint per pose": checkpoint_step}


class Measurement(NamedTuple):
    """What a step needs: seconds by round, peak bytes, and backwards through the model."""

    seconds: list[float]
    peak_bytes: int
    backwards: int


class Trial(NamedTuple):
    """One training step.

    Attributes:
        step: `"full graph"`, `"checkpoint per pose"`, or the name of an accumulator.
        combination: The combination.
        poses: Poses in the group.
        options: Further options of `MultiPose`; `memory` is 0 by default.
    """

    step: str
    combination: Combination
    poses: int
    options: Mapping[str, Any] = {}


class TrialRunner:
    """Runs trials on one reference model.

    Args:
        name: The model.
        poses: Poses of a group.
        long_group: Poses of a long group. A quarter of them are distinct; a longer group repeats the first `poses`.
        repeats: Timed rounds.
        device: Where to run.
    """

    def __init__(self, name: str, poses: int, long_group: int, repeats: int, device: torch.device | str) -> None:
        self.poses, self.long_group, self.repeats = poses, long_group, repeats
        self.device = torch.device(device)
        self.model, self.distinct_poses, self.spread = reference(name, max(poses, long_group // 4), device)

    def run(self, trials: Mapping[str, Trial]) -> dict[str, Measurement]:
        """Measure trials by name, interleaved with `"plain steps"` and `"plain forwards"` of `poses` poses."""
        steps = {name: self._training_step(trial) for name, trial in trials.items()}
        runs: dict[str, Callable[[], None]] = {"plain steps": self._plain_steps, "plain forwards": self._plain_forwards}
        runs.update((name, partial(self._run_step, step)) for name, step in steps.items())
        with preserved_state(self.model):
            for _ in range(WARM_UP_STEPS):
                for run in runs.values():
                    run()
            peaks = []
            for run in runs.values():
                self.model.zero_grad()
                peaks.append(peak_bytes(run, self.device))
            seconds = interleaved_seconds(list(runs.values()), self.repeats, self.device)
        reports = {name: step.report() for name, step in steps.items()}
        backwards = {name: 0 if report is None else report.backwards for name, report in reports.items()}
        return {
            name: Measurement(times, peak, backwards.get(name, 0))
            for name, times, peak in zip(runs, seconds, peaks, strict=True)
        }

    def gradient_bytes(self) -> int:
        """Return the bytes of one copy of the gradients."""
        return sum(leaf.nbytes for leaf in self.model.parameters() if leaf.requires_grad)

    def plain_step_peak(self, poses: int) -> int:
        """Return the peak of a plain step of the largest pose with the gradients of an earlier step, those included."""
        with preserved_state(self.model):
            self._plain_steps()
            peaks = [peak_bytes(partial(self._plain_step, pose), self.device) for pose in self._group(poses)]
        return self.gradient_bytes() + max(peaks)

    def _training_step(self, trial: Trial) -> TrainingStep:
        batch = TrainingBatch(self.model, self._group(trial.poses), trial.combination)
        if trial.step in BASELINES:
            return BASELINES[trial.step](batch)
        return multipose_step(batch, accumulator=trial.step, **{"memory": 0, **trial.options})

    def _group(self, poses: int) -> list[Any]:
        if poses <= len(self.distinct_poses):
            return self.distinct_poses[:poses]
        return [self.distinct_poses[index % self.poses] for index in range(poses)]

    def _run_step(self, step: TrainingStep) -> None:
        self.model.zero_grad()
        step.forward().combined.sum().backward()

    def _plain_step(self, pose: Any) -> None:
        call_model(self.model, pose).sum().backward()

    def _plain_steps(self) -> None:
        """Run forward and backward of each pose by itself, adding to `.grad`."""
        self.model.zero_grad()
        for pose in self.distinct_poses[: self.poses]:
            self._plain_step(pose)

    @torch.no_grad()
    def _plain_forwards(self) -> None:
        for pose in self.distinct_poses[: self.poses]:
            call_model(self.model, pose)

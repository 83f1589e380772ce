"""What one training step costs: in one graph, checkpointed pose by pose, and through gradhooks."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from conformers import Pose
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import gradhooks
from gradhooks.memory import PeakMemory
from gradhooks.testing import full_graph

REPEATS = 7
Forward = Callable[[Sequence[Pose]], Tensor]


class StepCost(NamedTuple):
    """One way to do a step, for a group of `poses` poses.

    Attributes:
        way: Its name.
        poses: Poses in the group.
        memory: Peak beyond what the model and the poses take, in bytes.
        seconds: Median time; on a CPU that of the process, in which one thread computes.
        deviation: Largest difference of a gradient from the full graph's, relative to the largest gradient.
    """

    way: str
    poses: int
    memory: int
    seconds: float
    deviation: float


def step_costs(scorer: gradhooks.MultiPose, groups: Sequence[Sequence[Pose]], target: Tensor) -> list[StepCost]:
    """Three ways for each group, with the full graph first.

    Args:
        scorer: Gives the model and the combination. It keeps its weights and loses its `.grad`.
        groups: Poses; each group is measured on its own.
        target: Of the squared error, of the shape of the combined prediction.
    """
    costs = []
    with tqdm(total=len(groups) * (REPEATS + 2), desc="measuring steps", leave=False) as progress:
        for poses in groups:
            costs += _costs(scorer, poses, target, progress)
    scorer.zero_grad()
    return costs


def _costs(
    scorer: gradhooks.MultiPose, poses: Sequence[Pose], target: Tensor, progress: "tqdm[NoReturn]"
) -> list[StepCost]:
    model = scorer.model

    def step(forward: Forward) -> None:
        scorer.zero_grad()
        (forward(poses) - target).square().sum().backward()

    def gradient(forward: Forward) -> Tensor:
        step(forward)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    def memory(forward: Forward) -> int:
        scorer.zero_grad()
        with PeakMemory(target.device) as meter:
            step(forward)
        return meter.peak

    ways = _ways(scorer)
    gradients = [gradient(forward) for forward in ways.values()]  # the first run of each, too: it warms up
    progress.update()
    peaks = [memory(forward) for forward in ways.values()]
    progress.update()
    # Interleaved, so that whatever else the machine does falls on all of them.
    rounds = []
    for _ in range(REPEATS):
        rounds.append([_seconds(step, forward, target.device) for forward in ways.values()])
        progress.update()
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    exact = gradients[0]
    deviations = [((one - exact).abs().max() / exact.abs().max()).item() for one in gradients]
    names = [*list(ways)[:-1], f"gradhooks ({scorer.report.accumulator})"]
    return [StepCost(name, len(poses), *cost) for name, *cost in zip(names, peaks, seconds, deviations, strict=True)]


def _ways(scorer: gradhooks.MultiPose) -> dict[str, Forward]:
    model: nn.Module = scorer.model
    combination = scorer.combination

    def checkpointed(poses: Sequence[Pose]) -> Tensor:
        predictions = torch.stack([checkpoint(model, *pose, use_reentrant=False) for pose in poses])
        combined: Tensor = combination(predictions)
        return combined

    return {
        "full graph": lambda poses: full_graph(model, poses, combination).combined,
        "checkpoint per pose": checkpointed,
        "gradhooks": lambda poses: scorer(poses).combined,
    }


def _seconds(step: Callable[[Forward], None], forward: Forward, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step(forward)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = time.process_time()  # of the one thread there is: what else the machine does is not counted
    step(forward)
    return time.process_time() - start

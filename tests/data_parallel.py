"""Trains by DistributedDataParallel around a MultiPose, and by the full graph, in one process or around DDP.

One process has the groups of all ranks, and as its loss the mean of theirs, to which DDP averages gradients.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_reference import AttentionPooling, Gradients, distances, gradients_of, of_both, of_combined, of_poses

import gradhooks
from gradhooks.accumulators import Auto, Recompute, Store, Stream
from gradhooks.combinations import Boltzmann, Min
from gradhooks.testing import full_graph

ACCUMULATORS = {"store": Store, "stream": Stream, "recompute": Recompute, "auto": Auto}
STEPS = 3
WIDTH = 4

Prediction = gradhooks.MultiPosePrediction
Weights = dict[str, Tensor]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.inner(pose)
        return prediction


class Branching(Plain):
    """Has a layer for poses whose first number is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.rarely = nn.Linear(WIDTH, 1)

    def forward(self, pose: Tensor) -> Tensor:
        prediction = super().forward(pose)
        return prediction + self.rarely(pose) if pose[0] > 0 else prediction


class Scaled(Plain):
    """Reads a buffer that every forward changes."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, pose: Tensor) -> Tensor:
        self.scale.mul_(0.9).add_(0.1 * pose.detach().std())
        return super().forward(pose) * self.scale.clone()


class Normalised(Scaled):
    """Writes statistics besides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(1, WIDTH, bias=False), nn.BatchNorm1d(WIDTH)

    def forward(self, pose: Tensor) -> Tensor:
        return super().forward(self.norm(self.first(pose.unsqueeze(-1))).tanh().mean(0))


class Table(nn.Module):
    """Sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.Embedding(10, WIDTH, sparse=True), nn.Linear(WIDTH, 1)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.last(self.rows((10 * pose).abs().long() % 10).tanh().sum(0))
        return prediction


class FullGraph(nn.Module):
    """The full graph as a module, to stand where a MultiPose stands."""

    def __init__(self, model: nn.Module, combination: Any) -> None:
        super().__init__()
        self.model, self.combination = model, combination

    def forward(self, poses: Any) -> Prediction:
        return full_graph(self.model, poses, self.combination)


class Alone(nn.Module):
    """Groups, one after the other, in one forward."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, groups: list[Any]) -> list[Prediction]:
        return [self.scorer(group) for group in groups]


class Encoded(Alone):
    """A larger model: an encoder of the whole group comes before, so that poses require grad, and a head after."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__(scorer)
        self.encoder, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(1, 1)

    def forward(self, groups: list[Any]) -> list[Prediction]:
        contexts = [self.encoder(torch.stack(list(group)).mean(0)).tanh() for group in groups]
        shifted = [[pose + context for pose in group] for group, context in zip(groups, contexts, strict=True)]
        predictions = super().forward(shifted)
        return [Prediction(self.head(prediction.combined), prediction.per_pose) for prediction in predictions]


def as_they_come(rank: int, step: int) -> float | None:
    del rank, step
    return None


def positive_on_the_first_rank(rank: int, step: int) -> float:
    del step
    return 1.0 if rank == 0 else -1.0


def positive_elsewhere_each_time(rank: int, step: int) -> float:
    """Nowhere at the second step."""
    return 1.0 if step != 1 and rank == step % 2 else -1.0


@dataclass(frozen=True)
class Scenario:
    """What is trained, and how.

    Attributes:
        model: Makes it.
        combination: Makes it.
        loss: Of one group.
        around: What stands between DDP and the MultiPose.
        silent: How many backwards come before the one that synchronises, at each step.
        together: How many groups go into one backward.
        at_once: Whether they go through one forward of DDP, too.
        sign: Of the first number of all poses of a rank at a step, which chooses the parameters that they reach.
        form: Of a group.
        options: Of MultiPose.
    """

    model: Callable[[], nn.Module] = Plain
    combination: Callable[[], nn.Module] = Boltzmann
    loss: Callable[[Prediction], Tensor] = of_both
    around: Callable[[nn.Module], nn.Module] = Alone
    silent: int = 0
    together: int = 1
    at_once: bool = True
    sign: Callable[[int, int], float | None] = as_they_come
    form: Callable[[Tensor], Any] = list
    options: dict[str, Any] = field(default_factory=dict)

    def turns(self, step: int, mode: dict[str, Any]) -> int:
        """How many backwards make a step. DDP learns a static graph at its first one, which must synchronise."""
        return 1 if mode.get("static_graph") and step == 0 else self.silent + 1

    def groups(self, rank: int, step: int, turn: int) -> list[Any]:
        """What a rank gets for one backward: other numbers of poses on each rank and at each step, sometimes one."""
        generator = torch.Generator().manual_seed(1000 * step + 100 * turn + rank)
        counts = [1 + (5 * rank + 2 * step + 3 * turn + 4 * place) % 7 for place in range(self.together)]
        drawn = [torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) for count in counts]
        sign = self.sign(rank, step)
        if sign is not None:
            for group in drawn:
                group[:, 0] = sign * group[:, 0].abs()
        return [self.form(group) for group in drawn]

    def loss_of(self, module: nn.Module, groups: list[Any]) -> Tensor:
        if self.at_once:
            predictions = module(groups)
        else:
            predictions = [prediction for group in groups for prediction in module([group])]
        return torch.stack([self.loss(prediction) for prediction in predictions]).prod()


SCENARIOS = {
    "one group": Scenario(),
    "chunks": Scenario(form=torch.Tensor.clone, options={"chunk_size": 2, "forward_chunk_size": 3}),
    "accumulation": Scenario(silent=2),
    "several groups": Scenario(together=2, silent=1),
    "several forwards": Scenario(together=2, silent=1, at_once=False),
    "combined only": Scenario(loss=of_combined),
    "poses only": Scenario(loss=of_poses),
    "learnable temperature": Scenario(combination=lambda: Boltzmann(0.9, learnable=True)),
    "learnable pooling": Scenario(combination=AttentionPooling),
    "sharp minimum": Scenario(combination=lambda: Min(scale=100.0)),
    "sparse gradients": Scenario(model=Table),
    "larger model": Scenario(around=Encoded, combination=AttentionPooling),
    "other parameters": Scenario(model=Branching, sign=positive_on_the_first_rank),
    "other parameters each time": Scenario(model=Branching, sign=positive_elsewhere_each_time),
    "buffers": Scenario(model=Scaled, together=2, silent=1),
    "buffers of several forwards": Scenario(model=Scaled, together=2, at_once=False),
    "statistics": Scenario(model=Normalised, together=2, silent=1),
}


def module_of(scenario: Scenario, accumulator: str | None) -> nn.Module:
    """What is to be wrapped, alike on all ranks; None is the full graph."""
    torch.manual_seed(0)
    model, combination = scenario.model(), scenario.combination()
    scorer: nn.Module = FullGraph(model, combination)
    if accumulator is not None:
        scorer = gradhooks.MultiPose(model, combination, accumulator=ACCUMULATORS[accumulator](), **scenario.options)
    return scenario.around(scorer).double()


class Course(NamedTuple):
    """Gradients and buffers after each backward that synchronised, and the weights in the end."""

    gradients: list[Gradients]
    buffers: list[Gradients]
    weights: Weights


def course_of(
    scenario: Scenario, accumulator: str | None, ranks: list[int], mode: dict[str, Any], *, wrapped: bool = True
) -> Course:
    """Train for three steps with the mean loss of the groups of `ranks`."""
    bare = module_of(scenario, accumulator)
    module = DistributedDataParallel(bare, **mode) if wrapped else bare
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    course = Course([], [], dict(bare.named_parameters()))
    for step in range(STEPS):
        optimizer.zero_grad()
        turns = scenario.turns(step, mode)
        for turn in range(turns):
            with silence(module, turn < turns - 1):
                for rank in ranks:
                    (scenario.loss_of(module, scenario.groups(rank, step, turn)) / len(ranks)).backward()
        course.gradients.append(gradients_of(course.weights))
        course.buffers.append({name: buffer.clone() for name, buffer in bare.named_buffers()})
        optimizer.step()
    return course


def silence(module: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    return module.no_sync() if wanted and isinstance(module, DistributedDataParallel) else nullcontext()


def deviation(found: Course, expected: Course) -> float:
    """The largest of a gradient or buffer, relative to its size; infinite where only one of the two has a gradient."""
    pairs = [*zip(found.gradients, expected.gradients, strict=True), *zip(found.buffers, expected.buffers, strict=True)]
    if any((ours[name] is None) != (theirs[name] is None) for ours, theirs in pairs for name in theirs):
        return float("inf")
    return max(distance for pair in pairs for distance in distances(*pair).values())

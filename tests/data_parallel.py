"""Train with DistributedDataParallel around a MultiPose, or with the full graph in one process or inside DDP.

The single process has the groups of all ranks. Its loss is the mean over ranks, because DDP averages gradients.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_reference import (
    AttentionPooling,
    Gradients,
    gradients_of,
    loss_on_both,
    loss_on_combined,
    loss_on_poses,
    relative_errors,
)

import gradhooks
from gradhooks.accumulators import Auto, Recompute, Store, Stream
from gradhooks.combinations import Boltzmann, Min
from gradhooks.testing import full_graph

ACCUMULATORS = {"store": Store, "stream": Stream, "recompute": Recompute, "auto": Auto}
STEPS = 3
WIDTH = 4

Prediction = gradhooks.MultiPosePrediction
Parameters = dict[str, Tensor]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.inner(pose)
        return prediction


class Branching(Plain):
    """One layer is used only by poses whose first number is positive."""

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


class Normalized(Scaled):
    """Also updates the running statistics of a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(1, WIDTH, bias=False), nn.BatchNorm1d(WIDTH)

    def forward(self, pose: Tensor) -> Tensor:
        return super().forward(self.norm(self.first(pose.unsqueeze(-1))).tanh().mean(0))


class SparseEmbedding(nn.Module):
    """Has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.Embedding(10, WIDTH, sparse=True), nn.Linear(WIDTH, 1)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.last(self.rows((10 * pose).abs().long() % 10).tanh().sum(0))
        return prediction


class FullGraph(nn.Module):
    """The full graph as a module that replaces a MultiPose."""

    def __init__(self, model: nn.Module, combination: Any) -> None:
        super().__init__()
        self.model, self.combination = model, combination

    def forward(self, poses: Any) -> Prediction:
        return full_graph(self.model, poses, self.combination)


class SeveralGroups(nn.Module):
    """Runs groups one after the other in one forward."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, groups: list[Any]) -> list[Prediction]:
        return [self.scorer(group) for group in groups]


class LargerModel(SeveralGroups):
    """Encodes the whole group before the MultiPose, so that poses require grad, and applies a head after it."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__(scorer)
        self.encoder, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(1, 1)

    def forward(self, groups: list[Any]) -> list[Prediction]:
        contexts = [self.encoder(torch.stack(list(group)).mean(0)).tanh() for group in groups]
        shifted = [[pose + context for pose in group] for group, context in zip(groups, contexts, strict=True)]
        predictions = super().forward(shifted)
        return [Prediction(self.head(prediction.combined), prediction.per_pose) for prediction in predictions]


def any_sign(rank: int, step: int) -> float | None:
    del rank, step
    return None


def positive_on_rank_0(rank: int, step: int) -> float:
    del step
    return 1.0 if rank == 0 else -1.0


def positive_on_alternating_ranks(rank: int, step: int) -> float:
    """Positive on another rank at each step, on none at step 1."""
    return 1.0 if step != 1 and rank == step % 2 else -1.0


@dataclass(frozen=True)
class Scenario:
    """A model and the way it is trained.

    Attributes:
        model: Creates the model.
        combination: Creates the combination.
        loss: Loss of one group.
        wrap: Creates the module between DDP and the MultiPose.
        unsynchronized: Number of backwards under `no_sync` before the one that synchronizes, at each step.
        groups_per_backward: Number of groups in one backward.
        one_forward: Whether these groups run in one forward of DDP.
        sign: Sign of the first number of all poses of a rank at a step; it selects the parameters they reach.
        make_group: Converts stacked poses to a group.
        options: Options of MultiPose.
    """

    model: Callable[[], nn.Module] = Plain
    combination: Callable[[], nn.Module] = Boltzmann
    loss: Callable[[Prediction], Tensor] = loss_on_both
    wrap: Callable[[nn.Module], nn.Module] = SeveralGroups
    unsynchronized: int = 0
    groups_per_backward: int = 1
    one_forward: bool = True
    sign: Callable[[int, int], float | None] = any_sign
    make_group: Callable[[Tensor], Any] = list
    options: dict[str, Any] = field(default_factory=dict)

    def backwards(self, step: int, ddp_options: dict[str, Any]) -> int:
        """Return the number of backwards at a step. DDP records a static graph at the first, which must synchronize."""
        return 1 if ddp_options.get("static_graph") and step == 0 else self.unsynchronized + 1

    def groups(self, rank: int, step: int, backward: int) -> list[Any]:
        """Return the groups of one backward. The number of poses varies between ranks and steps, and can be one."""
        generator = torch.Generator().manual_seed(1000 * step + 100 * backward + rank)
        counts = [1 + (5 * rank + 2 * step + 3 * backward + 4 * index) % 7 for index in range(self.groups_per_backward)]
        stacked = [torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) for count in counts]
        sign = self.sign(rank, step)
        if sign is not None:
            for group in stacked:
                group[:, 0] = sign * group[:, 0].abs()
        return [self.make_group(group) for group in stacked]

    def loss_of(self, module: nn.Module, groups: list[Any]) -> Tensor:
        if self.one_forward:
            predictions = module(groups)
        else:
            predictions = [prediction for group in groups for prediction in module([group])]
        return torch.stack([self.loss(prediction) for prediction in predictions]).prod()


SCENARIOS = {
    "one group": Scenario(),
    "chunks": Scenario(make_group=torch.Tensor.clone, options={"chunk_size": 2}),
    "accumulation": Scenario(unsynchronized=2),
    "several groups": Scenario(groups_per_backward=2, unsynchronized=1),
    "several forwards": Scenario(groups_per_backward=2, unsynchronized=1, one_forward=False),
    "combined only": Scenario(loss=loss_on_combined),
    "poses only": Scenario(loss=loss_on_poses),
    "learnable temperature": Scenario(combination=lambda: Boltzmann(0.9, learnable=True)),
    "learnable pooling": Scenario(combination=AttentionPooling),
    "sharp minimum": Scenario(combination=lambda: Min(scale=100.0)),
    "sparse gradients": Scenario(model=SparseEmbedding),
    "larger model": Scenario(wrap=LargerModel, combination=AttentionPooling),
    "other parameters": Scenario(model=Branching, sign=positive_on_rank_0),
    "other parameters each time": Scenario(model=Branching, sign=positive_on_alternating_ranks),
    "buffers": Scenario(model=Scaled, groups_per_backward=2, unsynchronized=1),
    "buffers of several forwards": Scenario(model=Scaled, groups_per_backward=2, one_forward=False),
    "statistics": Scenario(model=Normalized, groups_per_backward=2, unsynchronized=1),
}


def new_module(scenario: Scenario, accumulator: str | None) -> nn.Module:
    """Create the module to train, the same on all ranks. None selects the full graph."""
    torch.manual_seed(0)
    model, combination = scenario.model(), scenario.combination()
    scorer: nn.Module = FullGraph(model, combination)
    if accumulator is not None:
        options = {"memory": 0, **scenario.options}  # poses that run plainly show DDP which parameters they reach
        scorer = gradhooks.MultiPose(model, combination, accumulator=ACCUMULATORS[accumulator](), **options)
    return scenario.wrap(scorer).double()


class TrainingRun(NamedTuple):
    """Gradients and buffers after each step, and the final parameters."""

    gradients: list[Gradients]
    buffers: list[Gradients]
    parameters: Parameters


def train(
    scenario: Scenario, accumulator: str | None, ranks: list[int], ddp_options: dict[str, Any], *, wrapped: bool = True
) -> TrainingRun:
    """Train for three steps with the mean loss of the groups of `ranks`, inside DDP if `wrapped`."""
    bare = new_module(scenario, accumulator)
    module = DistributedDataParallel(bare, **ddp_options) if wrapped else bare
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    run = TrainingRun([], [], dict(bare.named_parameters()))
    for step in range(STEPS):
        optimizer.zero_grad()
        backwards = scenario.backwards(step, ddp_options)
        for backward in range(backwards):
            with synchronization(module, enabled=backward == backwards - 1):
                for rank in ranks:
                    (scenario.loss_of(module, scenario.groups(rank, step, backward)) / len(ranks)).backward()
        run.gradients.append(gradients_of(run.parameters))
        run.buffers.append({name: buffer.clone() for name, buffer in bare.named_buffers()})
        optimizer.step()
    return run


def synchronization(module: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    return nullcontext() if enabled or not isinstance(module, DistributedDataParallel) else module.no_sync()


def deviation(run: TrainingRun, expected: TrainingRun) -> float:
    """Return the largest relative deviation of a gradient or buffer; infinite if a gradient is None in one run only."""
    pairs = [*zip(run.gradients, expected.gradients, strict=True), *zip(run.buffers, expected.buffers, strict=True)]
    if any((actual[name] is None) != (wanted[name] is None) for actual, wanted in pairs for name in wanted):
        return float("inf")
    return max(distance for pair in pairs for distance in relative_errors(*pair).values())

"""Training on one rank, in small steps that an event may change."""

import copy
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradhooks
from gradhooks.testing import full_graph

if TYPE_CHECKING:
    from collections.abc import Callable

POSE_PARALLEL, DDP, FSDP2 = WAYS = ("pose parallel", "DDP", "FSDP2")
AFFECTED = 1
"""The rank on which something differs or fails."""


class Model(nn.Module):
    """A buffer counts its forwards. `disturb`, set by an event, may change or end one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.disturb: Callable[[Tensor], Tensor] | None = None

    def forward(self, pose: Tensor) -> Tensor:
        self.seen += 1
        hidden = self.first(pose).tanh()
        if self.disturb is not None:
            hidden = self.disturb(hidden)
        prediction: Tensor = self.second(hidden)
        return prediction


class FullGraphOf(nn.Module):
    """What MultiPose computes, in plain PyTorch; for pose parallel with the poses of all ranks."""

    def __init__(self, run: "Run") -> None:
        super().__init__()
        self.model, self.combination = run.model, gradhooks.MultiPose(run.model, run.combination).combination
        self._gathers = run.way == POSE_PARALLEL
        self._call = run.options.get("call", lambda model, pose: model(pose))

    def forward(self, poses: Any, groups: Any = None) -> gradhooks.MultiPosePrediction:
        own = (list(poses), None if groups is None else list(groups))
        pairs: list[Any] = [own]
        if self._gathers:
            pairs = [None] * dist.get_world_size()
            dist.all_gather_object(pairs, own)
        of_all = [pose for poses, _ in pairs for pose in poses]
        numbers = None if pairs[0][1] is None else [number for _, groups in pairs for number in groups]
        return full_graph(self.model, of_all, self.combination, numbers, call=self._call)


class Run:
    """The training of one rank.

    Args:
        rank: This rank.
        way: One of `WAYS`.
        plain: Whether to train in plain PyTorch, for comparison.

    Attributes:
        affected: Whether something differs on this rank.
        calls: How many forwards the model has run since the forward, or the backward, of this step began.
        before: The state before the forward, and then before the backward, of this step.
        start: When the event began: before the model is wrapped, or later.
    """

    def __init__(self, rank: int, way: str, *, plain: bool = False) -> None:
        torch.manual_seed(0)
        self.rank, self.way, self.plain = rank, way, plain
        self.affected = rank == AFFECTED
        self.model: Any = Model().double()
        self.combination: Any = "boltzmann"
        self.options: dict[str, Any] = {"memory": 0}
        self.for_ddp: dict[str, Any] = {}
        self.groups: list[int] | None = None
        self.step = self.calls = 0
        self.moment = ""
        self.before: list[Tensor] = []
        self.start = time.monotonic()
        self.module: Any = None

    def wrap(self) -> None:
        """Wrap the model, as the user of this way does."""
        if self.way == FSDP2 and not self.plain:
            from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not imported by processes without shards

            for part in (self.model.first, self.model):
                fully_shard(part)
        group = dist.group.WORLD if self.way == POSE_PARALLEL else None
        if self.plain:
            self.scorer: Any = FullGraphOf(self)
            for parameter in self.scorer.parameters() if self.way == FSDP2 else ():
                self._share(parameter.data)
        else:
            self.scorer = gradhooks.MultiPose(self.model, self.combination, process_group=group, **self.options)
        self.module = DistributedDataParallel(self.scorer, **self.for_ddp) if self.way == DDP else self.scorer
        self.optimizer = torch.optim.SGD(self.module.parameters(), 0.1)

    def _share(self, values: Tensor) -> None:
        """Make values the same on all ranks, as FSDP2 does: a shard comes from the rank that keeps it."""
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values)
        shards = [part.chunk(len(parts)) for part in parts]
        values.copy_(torch.cat([chunks[rank] for rank, chunks in enumerate(shards) if rank < len(chunks)]))

    def poses(self, rank: int | None = None) -> list[Tensor]:
        """Return the poses of a rank, by default of this one, for this step."""
        generator = torch.Generator().manual_seed(10 * self.step + (self.rank if rank is None else rank))
        return list(torch.randn(3, 4, generator=generator, dtype=torch.float64))

    def loss_of(self, prediction: gradhooks.MultiPosePrediction) -> Tensor:
        loss: Tensor = prediction.combined.square().sum() + 0.5 * prediction.per_pose.tanh().mean()
        return loss

    def forward(self, poses: Any = None, **arguments: Any) -> Tensor:
        if self.module is None:
            self.wrap()
        self.enter("forward")
        groups = {} if self.groups is None else {"groups": self.groups}
        prediction = self.module(self.poses() if poses is None else poses, **groups, **arguments)
        self.enter("between")
        return self.loss_of(prediction)

    def backward(self, loss: Tensor, **options: Any) -> None:
        self.enter("backward")
        loss.backward(**options)
        if self.plain and self.way == FSDP2:
            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.moment = ""

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.backward(self.forward())
            self.update()

    def begin_event(self) -> None:
        """What follows is the event: those before it were good steps."""
        self.start = time.monotonic()

    def enter(self, moment: str) -> None:
        """Note the moment, and the state before it."""
        self.moment, self.calls = moment, 0
        self.before = self.state()

    def state(self) -> list[Tensor]:
        """Return copies of parameters, buffers and gradients."""
        parameters = list(self.model.parameters())
        tensors = [*parameters, *self.model.buffers(), *(each.grad for each in parameters if each.grad is not None)]
        return [copy.deepcopy(local(each).detach()) for each in tensors]

    def is_unchanged(self) -> bool:
        now = self.state()
        if not self.before:
            return True
        return len(now) == len(self.before) and all(map(same_bits, now, self.before))


def local(tensor: Tensor) -> Tensor:
    """Return the shard of this rank."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())

"""A model that runs out of memory, as a device does, once the graphs that are alive cost more than a limit."""

from typing import Any

import torch
from torch import Tensor, nn


class Device:
    """A device with little memory. It is no part of a model's state: second runs do not restore it.

    Attributes:
        limit: The cost that fits; a pose costs 1 unless it brings its cost.
        used: The cost of what is alive.
        most: The largest value of `used` so far.
        chunk_sizes: The size of each chunk that ran.
    """

    __slots__ = ("chunk_sizes", "limit", "most", "used")

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.used = self.most = 0.0
        self.chunk_sizes: list[int] = []

    def allocate(self, cost: float) -> "Allocation":
        if self.used + cost > self.limit:
            raise torch.OutOfMemoryError("simulated")
        return Allocation(self, cost)


class Allocation:
    """Memory that is freed with the last reference to this object."""

    def __init__(self, device: Device, cost: float) -> None:
        self.device, self.cost = device, cost
        device.used += cost
        device.most = max(device.most, device.used)

    def __del__(self) -> None:
        self.device.used -= self.cost


class UseMemory(torch.autograd.Function):
    """The identity; its graph holds memory, or its backward needs it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: Device, where: str, cost: float) -> Tensor:
        ctx.device, ctx.where, ctx.cost = device, where, cost
        ctx.allocation = device.allocate(cost) if where == "forward" else None
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.where == "backward":
            ctx.device.allocate(ctx.cost)
        ctx.allocation = None
        return gradient, None, None, None


class LimitedMemory(nn.Module):
    """Runs out of memory after its first layers ran and its state changed.

    Attributes:
        device: The device, with its limit.
        where: What needs memory: "forward" (with its graph, if it builds one), "graph" (a forward in grad mode), or
            "backward".
    """

    def __init__(self, limit: float, where: str = "forward", inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), inner or nn.Tanh(), nn.Linear(6, 1)
        self.device, self.where = Device(limit), where

    @property
    def chunk_sizes(self) -> list[int]:
        """The size of each chunk that ran."""
        return self.device.chunk_sizes

    def forward(self, features: Tensor, cost: Tensor | None = None) -> Tensor:
        features = torch.atleast_2d(features)
        self.device.chunk_sizes.append(len(features))
        hidden = self.inner(self.first(features))
        total = len(features) if cost is None else cost.sum().item()
        if self.where != "graph":
            hidden = UseMemory.apply(hidden, self.device, self.where, total)
        elif torch.is_grad_enabled():
            hidden = UseMemory.apply(hidden, self.device, "forward", total)
        return self.last(hidden)

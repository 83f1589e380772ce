"""PoseShares: which share of the poses mattered in recent batches, as running averages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from gradhooks.engine.accumulation import Coefficients
from gradhooks.numerics import at_least_float32, largest_per_row, on_host

NEWEST_SHARE = 0.3
"""The share of the newest batch in the running averages."""


@dataclass(frozen=True)
class Observation:
    """What one batch, or a part of it, shows. The tensors stay where they are until somebody asks.

    Attributes:
        sizes: Shape `(n,)`: the largest absolute coefficient of each pose.
        threshold: The size relative to the largest coefficient below which a pose needs no backward.
        largest: Shape `()`: the largest coefficient of the whole batch, if this is a part of it.
        read: Shape `(n,)`, bool: whether the loss reads the pose directly; None if it reads none, or unknown.
        log_weights: Shape `(n,)`: what the combination declares, in the order of the poses; None if not declared.
        groups: The groups of the poses; None for one group.
        intercepted: Whether an accumulator served these poses, so that `read` is known.
    """

    sizes: Tensor
    threshold: float
    largest: Tensor | None = None
    read: Tensor | None = None
    log_weights: Tensor | None = None
    groups: Sequence[int] | None = None
    intercepted: bool = True


def as_plain_values(observations: Sequence[Observation]) -> list[dict[str, Any]]:
    """Return a dictionary for each observation, of numbers and of tensors on the CPU."""
    plain = []
    for one in observations:
        values = {each.name: getattr(one, each.name) for each in fields(one)}
        values["groups"] = None if one.groups is None else list(one.groups)
        plain.append({name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()})
    return plain


def observe(
    coefficients: Coefficients, threshold: float, log_weights: Tensor | None, groups: Sequence[int] | None
) -> Observation:
    """Return the observation of a batch that an accumulator has served."""
    direct = coefficients.direct
    read = None if direct is None else reduce(direct.detach() != 0, "n ... -> n", "any")
    return Observation(
        largest_per_row(coefficients.total.detach()), threshold, coefficients.largest, read, log_weights, groups
    )


def observe_plain(coefficients: Tensor) -> Observation:
    """Return the observation of poses that ran plainly, of which only the coefficients are known."""
    rounding = torch.finfo(at_least_float32(coefficients.dtype)).eps / 2
    threshold = rounding / max(1, coefficients.shape[0])
    return Observation(largest_per_row(coefficients.detach()), threshold, intercepted=False)


@dataclass
class PoseShares:
    """Shares of poses in recent batches, 1 and 0 before the first.

    Attributes:
        significant: Of the poses whose coefficient is significant beside the largest of the batch.
        significant_online: Of the poses whose log-weight was significant beside the largest of their group so far.
        read_directly: Of the poses that the loss reads directly.
        batches: The number of batches seen.
    """

    significant: float = 1.0
    significant_online: float = 1.0
    read_directly: float = 0.0
    batches: int = 0
    _seen: set[str] = field(default_factory=set)

    def learn(self, observations: Sequence[Observation]) -> None:
        """Take the parts of a batch into the averages. Waits for the device once."""
        if not observations:
            return
        observations = _on_host(observations)
        self._average("significant", _significant(observations))
        intercepted = [one for one in observations if one.intercepted]
        if intercepted:
            read = sum(0 if one.read is None else int(one.read.sum()) for one in intercepted)
            self._average("read_directly", read / max(1, sum(len(one.sizes) for one in intercepted)))
        declared = [(one, one.log_weights) for one in observations if one.log_weights is not None]
        if declared:
            online = sum(_significant_online(one, log_weights) for one, log_weights in declared)
            self._average("significant_online", online / max(1, sum(len(one.sizes) for one, _ in declared)))
        self.batches += 1

    def _average(self, name: str, newest: float) -> None:
        known = getattr(self, name)
        setattr(self, name, known + (NEWEST_SHARE if name in self._seen else 1.0) * (newest - known))
        self._seen.add(name)

    def as_plain_values(self) -> dict[str, Any]:
        """Return a dictionary of numbers and strings."""
        return {**asdict(self), "_seen": sorted(self._seen)}

    @classmethod
    def of_plain_values(cls, values: Mapping[str, Any]) -> "PoseShares":
        """Return what `as_plain_values` has written."""
        return cls(**{**values, "_seen": set(values["_seen"])})


def _on_host(observations: Sequence[Observation]) -> list[Observation]:
    """Return observations whose tensors are on the CPU, in float64."""
    names = ("sizes", "largest", "read", "log_weights")
    held = [
        (one, name)
        for one in range(len(observations))
        for name in names
        if getattr(observations[one], name) is not None
    ]
    fetched = on_host(*(getattr(observations[one], name) for one, name in held))
    fields: list[dict[str, Any]] = [{} for _ in observations]
    for (one, name), tensor in zip(held, fetched, strict=True):
        fields[one][name] = tensor
    return [replace(one, **own) for one, own in zip(observations, fields, strict=True)]


def _significant(observations: Sequence[Observation]) -> float:
    """Return the share of significant coefficients, beside the largest of all parts."""
    sizes = [one.sizes for one in observations]
    known = [one.largest.view(1) for one in observations if one.largest is not None]
    together = torch.cat([*sizes, *known])
    largest = torch.where(together.isfinite(), together, 0.0).amax() if len(together) else torch.zeros(())
    significant = 0
    for size, one in zip(sizes, observations, strict=True):
        significant += int((~(size <= largest * one.threshold)).sum())
    return significant / max(1, sum(map(len, sizes)))


def _significant_online(observation: Observation, declared: Tensor) -> int:
    """Return how many poses had a significant log-weight beside the largest of their group so far."""
    log_weights = declared.nan_to_num(nan=math.inf).tolist()
    least = math.log(observation.threshold or torch.finfo(torch.float64).tiny)
    tops: dict[int, float] = {}
    significant = 0
    for log_weight, group in zip(log_weights, observation.groups or [0] * len(log_weights), strict=True):
        top = tops[group] = max(log_weight, tops.get(group, -math.inf))
        significant += log_weight >= top + least
    return significant

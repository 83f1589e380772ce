"""Accumulators that break one promise each, by the check that must refuse them and what it must say."""
# ruff: noqa: ARG002

from typing import Any

import torch
from torch import Tensor

from gradhooks.accumulators import Accumulation, Accumulator, Coefficients, Recompute, Store

Gradients = list[Tensor | None]


class BrokenLedger(Accumulation):
    """A right one, to be broken by subclasses."""

    def __init__(self, group: Any, right: Accumulation) -> None:
        self.group = group
        self.right = right
        self.calls = 0

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        return self.right.keeps_graph

    def add(self, chunk: Any, predictions: Tensor) -> None:
        self.right.add(chunk, predictions)

    def close(self, predictions: Tensor) -> Any:
        return self.right.close(predictions)

    def gradients(self, kept: Any, coefficients: Coefficients, *, last: bool) -> Gradients:
        return self.right.gradients(kept, coefficients, last=last)


class Doubled(BrokenLedger):
    def gradients(self, kept: Any, coefficients: Coefficients, *, last: bool) -> Gradients:
        found = super().gradients(kept, coefficients, last=last)
        return [None if gradient is None else 2 * gradient for gradient in found]


class IgnoresDirect(BrokenLedger):
    def gradients(self, kept: Any, coefficients: Coefficients, *, last: bool) -> Gradients:
        return super().gradients(kept, Coefficients(coefficients.through_combination, None), last=last)


class ZerosEverywhere(BrokenLedger):
    def gradients(self, kept: Any, coefficients: Coefficients, *, last: bool) -> Gradients:
        found = super().gradients(kept, coefficients, last=last)
        leaves = self.group.shadows.leaves
        return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


class WrongAfterAll(BrokenLedger):
    """Wrong in a group of one, in vectors, in the second backward: by its subclasses."""

    def wrong(self, predictions: Tensor) -> bool:
        raise NotImplementedError

    def gradients(self, kept: Any, coefficients: Coefficients, *, last: bool) -> Gradients:
        self.calls += 1
        found = super().gradients(kept, coefficients, last=last)
        return [one if one is None or not self.wrong(kept[0]) else one + 1 for one in found]


class WrongForOne(WrongAfterAll):
    def wrong(self, predictions: Tensor) -> bool:
        return len(predictions) == 1


class WrongForVectors(WrongAfterAll):
    def wrong(self, predictions: Tensor) -> bool:
        return predictions.dim() > 1


class WrongTheSecondTime(WrongAfterAll):
    def wrong(self, predictions: Tensor) -> bool:
        return self.calls > 1


class DrawsAnew(BrokenLedger):
    def add(self, chunk: Any, predictions: Tensor) -> None:
        self.first = chunk if chunk.start == 0 else self.first
        super().add(chunk._replace(before=self.first.before), predictions)


class LeavesHooks(BrokenLedger):
    def __init__(self, group: Any, right: Accumulation) -> None:
        super().__init__(group, right)
        for parameter in group.shadows.real:
            parameter.register_post_accumulate_grad_hook(lambda _: None)


class Opens(Accumulator):
    name = "broken"

    def __init__(self, accumulation: type[BrokenLedger]) -> None:
        self.accumulation = accumulation

    def open(self, group: Any, predictions: Tensor) -> Accumulation:
        return self.accumulation(group, Recompute().open(group, predictions))


class Forgets(Recompute):
    """Right in the first group only."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 0

    def open(self, group: Any, predictions: Tensor) -> Accumulation:
        self.groups += 1
        right = super().open(group, predictions)
        return right if self.groups == 1 else Doubled(group, right)


class RoundsToFloat32(Store):
    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)


BROKEN_ACCUMULATORS: list[tuple[Accumulator, str, str]] = [
    (Opens(Doubled), "check_every_loss", "off the full graph's"),
    (Opens(IgnoresDirect), "check_every_loss", "with a loss of the pose predictions"),
    (Opens(ZerosEverywhere), "check_every_loss", "'unused' is there, that of the full graph None"),
    (RoundsToFloat32(), "check_every_loss", "off the full graph's"),
    (Opens(WrongForOne), "check_group_of_one", "off the full graph's"),
    (Opens(WrongForVectors), "check_vector_predictions", "off the full graph's"),
    (Opens(WrongTheSecondTime), "check_backward_twice", "off the full graph's"),
    (Opens(DrawsAnew), "check_dropout", "off the full graph's|ReplayError"),
    (Forgets(), "check_several_groups", "group 1 of one MultiPose"),
    (Opens(LeavesHooks), "check_leaves_no_trace", "left hooks"),
]

"""Accumulators that violate one rule of the contract each, with the check that refuses them and its message."""
# ruff: noqa: ARG002

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradhooks.accumulators import Accumulation, Accumulator, Chunk, Coefficients, Engine, Recompute, Store

Gradients = list[Tensor | None]


class Broken(Accumulation):
    """Delegates to a correct accumulation; subclasses break one method."""

    def __init__(self, engine: Engine, correct: Accumulation) -> None:
        self.engine = engine
        self.correct = correct
        self.calls = 0

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        return self.correct.keeps_graph

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self.correct.add(chunk, predictions)

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        return self.correct.close(predictions)

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        return self.correct.gradients(saved, coefficients, last=last)


class Doubled(Broken):
    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        gradients = super().gradients(saved, coefficients, last=last)
        return [None if gradient is None else 2 * gradient for gradient in gradients]


class IgnoresDirect(Broken):
    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        return super().gradients(saved, Coefficients(coefficients.through_combination, None), last=last)


class ZerosEverywhere(Broken):
    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        gradients = super().gradients(saved, coefficients, last=last)
        leaves = self.engine.leaves
        return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, gradients, strict=True)]


class WrongIf(Broken):
    """Returns wrong gradients if a condition holds, which subclasses define."""

    def wrong(self, predictions: Tensor) -> bool:
        raise NotImplementedError

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        self.calls += 1
        gradients = super().gradients(saved, coefficients, last=last)
        return [one if one is None or not self.wrong(saved[0]) else one + 1 for one in gradients]


class WrongForOnePose(WrongIf):
    def wrong(self, predictions: Tensor) -> bool:
        return len(predictions) == 1


class WrongForVectors(WrongIf):
    def wrong(self, predictions: Tensor) -> bool:
        return predictions.dim() > 1


class WrongTheSecondTime(WrongIf):
    def wrong(self, predictions: Tensor) -> bool:
        return self.calls > 1


class DrawsRandomNumbers(Broken):
    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        torch.rand(())  # the next chunk draws other numbers than in the full graph
        super().add(chunk, predictions)


class LeavesHooks(Broken):
    def __init__(self, engine: Any, correct: Accumulation) -> None:
        super().__init__(engine, correct)
        for parameter in engine.context.shadows.real:
            parameter.register_post_accumulate_grad_hook(lambda _: None)


class With(Accumulator):
    """Recomputes with a broken accumulation."""

    name = "broken"

    def __init__(self, accumulation: type[Broken]) -> None:
        self.accumulation = accumulation

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        return self.accumulation(engine, Recompute().begin(engine, predictions))


class CorrectOnce(Recompute):
    """Correct in the first group only."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 0

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        self.groups += 1
        correct = super().begin(engine, predictions)
        return correct if self.groups == 1 else Doubled(engine, correct)


class RoundsToFloat32(Store):
    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)


BROKEN_ACCUMULATORS: dict[str, tuple[Accumulator, str, str]] = {
    "doubled": (With(Doubled), "check_every_loss", "differs from the full graph's"),
    "ignores direct": (With(IgnoresDirect), "check_every_loss", "with a loss of the pose predictions"),
    "zeros everywhere": (With(ZerosEverywhere), "check_every_loss", "'unused' is a tensor, but None in the full graph"),
    "rounds to float32": (RoundsToFloat32(), "check_every_loss", "differs from the full graph's"),
    "wrong for one pose": (With(WrongForOnePose), "check_group_of_one", "differs from the full graph's"),
    "wrong for vectors": (With(WrongForVectors), "check_vector_predictions", "differs from the full graph's"),
    "wrong the second time": (With(WrongTheSecondTime), "check_backward_twice", "differs from the full graph's"),
    "draws random numbers": (With(DrawsRandomNumbers), "check_dropout", "differs from the full graph's|ReplayError"),
    "correct once": (CorrectOnce(), "check_several_groups", "group 1 of one MultiPose"),
    "leaves hooks": (With(LeavesHooks), "check_leaves_no_trace", "left hooks"),
}

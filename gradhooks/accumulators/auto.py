"""Auto: choose the cheapest exact accumulator for each group."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Engine, set_accumulator
from gradhooks.accumulators.online_softmax import declaration_of
from gradhooks.accumulators.recompute import Recompute
from gradhooks.accumulators.store import Store
from gradhooks.accumulators.stream import StreamAccumulation, why_not_streamed
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.gradient_sums import Gradients

FORWARD_SHARE = 0.25
"""The cost of a forward without a graph relative to a training step of a pose.

Measured: 0.15 for SchNet, 0.29 for a transformer and a residual network. It is a constant, so that the same poses lead
to the same choice, and to the same bits, in every process.
"""
INERTIA = 1.1
"""The choice changes only if the other accumulator is cheaper by this factor."""
NEWEST_SHARE = 0.3
"""The share of the newest group in the running averages."""

Observer = Callable[[Tensor, Coefficients], None]


class Auto(Accumulator):
    """Streams where earlier groups show that it is cheaper, and recomputes elsewhere.

    Of the poses of a group let b be the share whose log-weight was significant when the pose ran, k the share that is
    significant in the end, and r the share that the loss reads directly. With a forward without a graph costing
    f = `FORWARD_SHARE` of a step, streaming costs f + b (1 - f) + r steps per pose and recomputing f + max(k, r). A
    declaration of equal weights has b = k = 1, and needs no earlier group. Otherwise the first group is recomputed,
    which is never much more expensive, while streaming is where every pose has the largest log-weight so far.
    """

    name = "auto"
    supports_sharded = True

    def __init__(self) -> None:
        self._significant_online = self._significant_final = 1.0
        self._read_directly = 0.0
        self._groups = 0
        self._streams = False

    def uses_plain_chunks(self) -> bool:
        return True

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        if engine.combination.combine_gradients is not None:
            return Store().begin_because(engine, predictions, "the combination works on the gradients of the poses")
        declaration = declaration_of(engine, predictions)
        if declaration is None:
            return Recompute().begin_because(engine, predictions, why_not_streamed(predictions))
        self._decide(uniform=declaration.uniform)
        reason = self._reason(uniform=declaration.uniform)
        accumulation: Accumulation
        if self._streams:
            set_accumulator(engine, "stream", reason)
            accumulation = StreamAccumulation(engine, declaration, predictions)
        else:
            accumulation = Recompute().begin_because(engine, predictions, reason)
        return ObservedAccumulation(accumulation, lambda *arguments: self._learn(engine, *arguments))

    def _decide(self, *, uniform: bool) -> None:
        if self._groups == 0:
            self._streams = uniform
            return
        streamed = FORWARD_SHARE + self._significant_online * (1 - FORWARD_SHARE) + self._read_directly
        recomputed = FORWARD_SHARE + max(self._significant_final, self._read_directly)
        margin = 1 / INERTIA if self._streams else INERTIA
        self._streams = streamed * margin <= recomputed

    def _reason(self, *, uniform: bool) -> str:
        if self._groups == 0:
            return "all poses have the same weight" if uniform else "no earlier group shows how many poses matter"
        return (
            f"in earlier groups {self._significant_online:.0%} of the poses were significant when they ran, "
            f"{self._significant_final:.0%} in the end, and the loss read {self._read_directly:.0%} directly; a "
            f"forward without a graph counts {FORWARD_SHARE:.0%} of a step"
        )

    def _learn(self, engine: Engine, predictions: Tensor, coefficients: Coefficients) -> None:
        declaration = declaration_of(engine, predictions)
        if declaration is None:
            return
        log_weights = torch.tensor(declaration.log_weights, dtype=torch.float64).nan_to_num(nan=math.inf)
        least = math.log(engine.skip_threshold(predictions.dtype) or torch.finfo(torch.float64).tiny)
        online = (log_weights >= log_weights.cummax(0).values + least).double().mean().item()
        final = (log_weights >= log_weights.max() + least).double().mean().item()
        direct = coefficients.direct
        read_directly = 0.0 if direct is None else (direct != 0).double().mean().item()
        newest = 1.0 if self._groups == 0 else NEWEST_SHARE
        self._significant_online += newest * (online - self._significant_online)
        self._significant_final += newest * (final - self._significant_final)
        self._read_directly += newest * (read_directly - self._read_directly)
        self._groups += 1


class ObservedAccumulation(Accumulation):
    """Delegates to another accumulation, and passes the predictions and coefficients to an observer afterwards."""

    def __init__(self, accumulation: Accumulation, observe: Observer) -> None:
        self._accumulation = accumulation
        self._observe = observe

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        return self._accumulation.keeps_graph

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self._accumulation.add(chunk, predictions)

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        return [predictions, *self._accumulation.close(predictions)]

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        gradients = self._accumulation.gradients(saved[1:], coefficients, last=last)
        self._observe(saved[0], coefficients)
        return gradients

"""Auto: choose the cheapest exact accumulator for each batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Engine, set_accumulator
from gradhooks.accumulators.declared_weights import DeclaredWeights, declared_weights
from gradhooks.accumulators.pose_shares import Observation, PoseShares, as_plain_values, observe, observe_plain
from gradhooks.accumulators.recompute import Recompute
from gradhooks.accumulators.store import Store
from gradhooks.accumulators.stream import StreamAccumulation, chunks_of, why_not_streamed
from gradhooks.engine.accumulation import Accumulation, Chunk, Coefficients
from gradhooks.engine.gradient_sums import Gradients

FORWARD_SHARE = 0.25
"""The cost of a forward without a graph relative to a training step of a pose.

Measured: 0.15 for SchNet, 0.29 for a transformer and a residual network. It is a constant, so that the same poses lead
to the same choice, and to the same bits, in every process.
"""
INERTIA = 1.1
"""The choice changes only if the other accumulator is cheaper by this factor."""
Observer = Callable[[Tensor, Coefficients], None]


class Auto(Accumulator):
    """Streams where recent batches show that it is cheaper, and recomputes elsewhere.

    Of the poses of a batch let k be the share whose coefficient is significant beside the largest, b the share whose
    log-weight was significant when the pose ran, and r the share that the loss reads directly. Let m be the backwards
    of a chunk in stream: one for each group, times R where the chunk has several poses of a group and R > 1. With a
    forward without a graph costing f = `FORWARD_SHARE` of a training step, a pose costs f + b (1 - f) m + r steps in
    stream and f + max(k, r) in recompute. Chunks of n poses cost 1 + o / n times as much, where o is the overhead of a
    chunk, and those of stream may be smaller. A declaration of equal weights has b = k = 1 in the first batch too.
    Otherwise the first batch is recomputed, which is never much more expensive, while streaming is where every pose has
    the largest log-weight so far. Several groups are streamed only where their sums fit in memory.
    """

    name = "auto"
    supports_sharded = True
    uses_plain_chunks = True

    def __init__(self) -> None:
        self._shares = PoseShares()
        self._pending: list[Observation] = []
        self._previous: list[Observation] = []  # of the batch before, if it ran plainly
        self._streams = False

    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        if engine.combination.combine_gradients is not None:
            return Store().begin_because(engine, predictions, "the combination works on the gradients of the poses")
        self._learn()
        declaration = declared_weights(engine, predictions)
        if not engine.findings.repeatable:
            return _begin_single_run(engine, predictions, declaration)
        reason = self._choose(engine, declaration, predictions)
        if declaration is None or not self._streams:
            return self._observed(engine, Recompute().begin_because(engine, reason))
        set_accumulator(engine, "stream", reason)
        return self._observed(engine, StreamAccumulation(engine, declaration, predictions))

    def _choose(self, engine: Engine, declaration: DeclaredWeights | None, predictions: Tensor) -> str:
        """Choose whether to stream, and return the reason."""
        reason = why_not_streamed(engine, predictions, declaration)
        if declaration is None or reason or not engine.findings.linear:
            self._streams = False
            return reason
        chunks = chunks_of(engine)
        copies = chunks.group_count * (1 + declaration.feature_count)
        if chunks.group_count > 1 and copies * engine.gradient_bytes > engine.memory_left:
            self._streams = False
            return f"streaming needs {copies} copies of the gradients, which do not fit in memory"
        size = declaration.pose_count
        backwards = chunks.backwards(size, 1 + declaration.feature_count)
        overhead = engine.chunk_overhead
        smaller = (1 + overhead / chunks.mean_size(size)) / (1 + overhead / size)
        return self._decide(declaration, backwards, smaller)

    def _decide(self, declaration: DeclaredWeights, backwards: float, smaller_chunks: float = 1.0) -> str:
        """Choose by the costs, and return them.

        Args:
            declaration: What the combination declares for the first chunk.
            backwards: How many backwards a chunk of the stream needs.
            smaller_chunks: The cost of the chunks of the stream relative to those of a second run.
        """
        shares = self._shares
        if not shares.batches and not declaration.uniform:
            self._streams = False
            return "no earlier batch shows how many poses matter"
        # On a device, nobody waits to see which log-weights are significant: all poses get a backward.
        all_run = declaration.uniform or not declaration.is_on_host
        online = 1.0 if all_run else shares.significant_online
        run_once = FORWARD_SHARE + online * (1 - FORWARD_SHARE) * backwards
        streamed = run_once * smaller_chunks + shares.read_directly
        recomputed = FORWARD_SHARE + max(shares.significant, shares.read_directly)
        self._streams = streamed * (1 / INERTIA if self._streams else INERTIA) <= recomputed
        costs = f"a pose costs {streamed:.2f} steps streamed, {recomputed:.2f} recomputed"
        if declaration.uniform:
            return "all poses have the same weight" + ("" if self._streams else f": {costs}")
        return (
            f"{online:.0%} of the poses were significant when they ran, {shares.significant:.0%} in the end, and the "
            f"loss read {shares.read_directly:.0%} directly: {costs}"
        )

    def begin_plain(self) -> None:
        # While all batches run plainly nothing is evaluated, and only the newest observations are kept.
        if self._pending:
            self._previous, self._pending = self._pending, []

    def observe_plain(self, coefficients: Tensor) -> None:
        self._pending.append(observe_plain(coefficients))

    def _learn(self) -> None:
        """Evaluate what was observed since the last batch; until then nothing waits for the device."""
        pending, self._previous, self._pending = [*self._previous, *self._pending], [], []
        self._shares.learn(pending)

    def _observed(self, engine: Engine, accumulation: Accumulation) -> Accumulation:
        return ObservedAccumulation(accumulation, lambda *arguments: self._observe(engine, *arguments))

    def _observe(self, engine: Engine, predictions: Tensor, coefficients: Coefficients) -> None:
        declared = engine.declare(predictions.flatten(), 0) if len(predictions) else None
        threshold = engine.skip_threshold(predictions.dtype)
        log_weights = None if declared is None or declared.log_weights is None else declared.log_weights.detach()
        self._pending.append(observe(coefficients, threshold, log_weights, engine.groups))

    def learned(self) -> dict[str, Any]:
        # What was observed is not evaluated here: a run that is saved must go on as one that is not.
        return {
            "shares": self._shares.as_plain_values(),
            "pending": as_plain_values(self._pending),
            "previous": as_plain_values(self._previous),
            "streams": self._streams,
        }

    def learn_from(self, values: Mapping[str, Any]) -> None:
        self._shares = PoseShares.of_plain_values(values["shares"])
        self._pending = [Observation(**one) for one in values["pending"]]
        self._previous = [Observation(**one) for one in values["previous"]]
        self._streams = values["streams"]

    def __getstate__(self) -> dict[str, Any]:
        self._learn()  # so that a copy contains numbers only
        return self.__dict__


def _begin_single_run(engine: Engine, predictions: Tensor, declaration: DeclaredWeights | None) -> Accumulation:
    """Begin a batch of a model whose second run does not agree with the first."""
    reason = "a second run of a pose does not agree with the first, so that each runs once"
    if declaration is not None and not why_not_streamed(engine, predictions, declaration):
        set_accumulator(engine, "stream", reason)
        return StreamAccumulation(engine, declaration, predictions)
    is_scalar = predictions.numel() == len(predictions)
    if is_scalar and engine.pose_count * engine.gradient_bytes <= engine.memory_left:
        return Store().begin_because(engine, predictions, reason)
    return Recompute().begin_because(engine, reason)  # refuses, and says why


class ObservedAccumulation(Accumulation):
    """Delegates to another accumulation, and passes scalar predictions and coefficients to an observer afterwards.

    Of predictions that are not scalars the observer gets none, in their dtype: they may be large.
    """

    def __init__(self, accumulation: Accumulation, observe: Observer) -> None:
        self._accumulation = accumulation
        self._observe = observe

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        return self._accumulation.keeps_graph

    def add(self, chunk: Chunk, predictions: Tensor) -> None:
        self._accumulation.add(chunk, predictions)

    def longest_chunk(self, start: int) -> int | None:
        return self._accumulation.longest_chunk(start)

    def close(self, predictions: Tensor) -> Sequence[Tensor]:
        observed = predictions if predictions.numel() == len(predictions) else predictions.new_empty(0)
        return [observed, *self._accumulation.close(predictions)]

    def gradients(self, saved: Sequence[Tensor], coefficients: Coefficients, *, last: bool) -> Gradients:
        gradients = self._accumulation.gradients(saved[1:], coefficients, last=last)
        self._observe(saved[0], coefficients)
        return gradients

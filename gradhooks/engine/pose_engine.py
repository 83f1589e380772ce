"""PoseEngine: the part of a batch that an accumulator sees."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property

import torch
from torch import Tensor

from gradhooks.combination import BoundCombination, StreamWeights
from gradhooks.engine.accumulation import Chunk  # noqa: TC001 - the annotation of an attribute
from gradhooks.engine.context import ForwardContext
from gradhooks.engine.findings import Findings
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.parameter_hooks import Receiver
from gradhooks.engine.prediction_digest import first_run_of, tensors_to_compare
from gradhooks.engine.report import Report
from gradhooks.engine.rerun import SecondRun
from gradhooks.engine.unused_parameters import add_zeros_for_skipped
from gradhooks.numerics import at_least_float32
from gradhooks.options import Options


class PoseEngine:
    """Implements the protocol `gradhooks.accumulators.Engine`, where its members are documented.

    Args:
        context: The intercepted poses.
    """

    def __init__(self, context: ForwardContext) -> None:
        self.context = context
        self.chunks: list[Chunk] = []
        self._stateless = False

    @property
    def options(self) -> Options:
        return self.context.batch.options

    @property
    def combination(self) -> BoundCombination:
        return self.context.batch.combination

    @property
    def report(self) -> Report:
        return self.context.batch.report

    @property
    def pose_count(self) -> int:
        return len(self.context.poses)

    @property
    def findings(self) -> Findings:
        return self.context.findings

    @property
    def leaves(self) -> Sequence[Tensor]:
        return self.context.leaves.shadows

    @property
    def leaf_names(self) -> list[str]:
        return self.context.leaves.names(self.context.batch.model)

    @property
    def groups(self) -> list[int] | None:
        return self._groups

    @cached_property
    def _groups(self) -> list[int] | None:
        groups = self.combination.groups
        if groups is None:
            return None
        first = self.context.first
        numbers: list[int] = groups.index[first : first + self.pose_count].tolist()
        return numbers

    @property
    def group_count(self) -> int:
        return self.report.groups

    @property
    def gradient_bytes(self) -> int:
        return self.context.batch.parts.gradient_bytes

    @property
    def memory_left(self) -> int:
        return self.context.batch.schedule.left

    @property
    def chunk_overhead(self) -> float:
        return self.context.batch.schedule.need.chunk_overhead

    def declare(self, predictions: Tensor, start: int) -> StreamWeights | None:
        return self.combination.declare(predictions, self.context.first + start)

    def intercept(self, receive: Receiver, indices: Iterable[int]) -> ExitStack:
        return self.context.leaves.hooks.intercept(receive, indices)

    def backward(
        self, predictions: Tensor, cotangents: Tensor, *, retain_graph: bool = False, poses: int | None = None
    ) -> None:
        self.context.backward(predictions, cotangents, retain_graph=retain_graph)
        self.report.backwards += len(predictions) if poses is None else poses

    def tensors_to_compare(self, predictions: Tensor) -> Sequence[Tensor]:
        return tensors_to_compare(predictions)

    def rerun(self, predictions: Tensor | Sequence[Tensor], cotangents: Tensor, selected: Tensor) -> Gradients:
        first = predictions if isinstance(predictions, Tensor) else first_run_of(predictions)
        return self._second_run().gradients(first, cotangents, selected)

    def add_zeros_for_skipped(self, gradients: Gradients, skipped: Tensor) -> None:
        add_zeros_for_skipped(self.context, self._second_run(), skipped, gradients)

    def reached_leaves(self, predictions: Tensor) -> set[int]:
        indices = {id(leaf): index for index, leaf in enumerate(self.leaves)}
        leaves = self.context.validator.reached_leaves(predictions)
        return {indices[id(leaf)] for leaf in leaves if id(leaf) in indices}

    def skip_threshold(self, dtype: torch.dtype) -> float:
        if self.options.tolerance is not None:
            return self.options.tolerance
        return torch.finfo(at_least_float32(dtype)).eps / 2 / self.context.batch.partition.total

    def fp16_scale(self, predictions: Tensor) -> float:
        dtypes = [predictions.dtype, *self.context.batch.autocast.dtypes, *(leaf.dtype for leaf in self.leaves)]
        return 2.0**12 if torch.float16 in dtypes else 1.0

    def end_first_run(self, *, stateless: bool) -> None:
        """Record whether the first run drew no random numbers and wrote no buffers."""
        self._stateless = stateless

    def _second_run(self) -> SecondRun:
        return SecondRun(self.context, self.chunks, stateless=self._stateless)

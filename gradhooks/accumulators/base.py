"""The contract of an accumulator, which computes `sum_i c_i dy_i/dtheta` without keeping N graphs."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from loguru import logger
from torch import Tensor

from gradhooks.combination import BoundCombination, StreamWeights
from gradhooks.engine.accumulation import Accumulation
from gradhooks.engine.findings import Findings
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.parameter_hooks import HookHandle, Receiver
from gradhooks.engine.report import Report
from gradhooks.errors import CombinationError, NonlinearBackwardError
from gradhooks.options import Options


class Engine(Protocol):
    """What an accumulator sees of a batch. All tensors are on the device of the model unless said otherwise."""

    @property
    def options(self) -> Options:
        """The options of the batch, frozen."""

    @property
    def combination(self) -> BoundCombination:
        """The combination with the arguments of this call."""

    @property
    def report(self) -> Report:
        """The report. An accumulator sets `accumulator`, `reason` and `skipped`."""

    @property
    def pose_count(self) -> int:
        """The number of poses on this process."""

    @property
    def groups(self) -> list[int] | None:
        """The number of the group of each pose on this process, on the host; None for one group."""

    @property
    def group_count(self) -> int:
        """`B`, the number of groups; 1 without `groups`."""

    @property
    def gradient_bytes(self) -> int:
        """The bytes of one copy of the gradients."""

    @property
    def memory_left(self) -> int:
        """The bytes that an accumulator may use beyond the step of one pose, after what open batches hold."""

    @property
    def chunk_overhead(self) -> float:
        """What a chunk costs beside its poses, in training steps of a pose, estimated from bytes; 0 if unknown."""

    @property
    def findings(self) -> Findings:
        """Whether a second run of a pose agrees with the first, and whether its backward is linear."""

    @property
    def leaves(self) -> Sequence[Tensor]:
        """The tensors at which the backward of each pose ends: shadow parameters, then detached pose inputs."""

    @property
    def leaf_names(self) -> list[str]:
        """The name of each leaf: that of the parameter, or `"input 0"`, `"input 1"`, ..."""

    def declare(self, predictions: Tensor, start: int) -> StreamWeights | None:
        """Return what the combination declares for the predictions, shape `(n,)`, of the poses from `start` on."""

    def intercept(self, receive: Receiver, indices: Iterable[int]) -> HookHandle:
        """Pass each gradient that arrives in a leaf to `receive(index, gradient)` instead of adding it to `.grad`."""

    def backward(
        self, predictions: Tensor, cotangents: Tensor, *, retain_graph: bool = False, poses: int | None = None
    ) -> None:
        """Run a backward from live predictions, with cotangents of the same shape, to the leaves.

        `poses` is the number of poses to add to `report.backwards`; None counts all rows.
        """

    def tensors_to_compare(self, predictions: Tensor) -> Sequence[Tensor]:
        """Return what `rerun` needs of the predictions, shape `(N, *prediction)`: of large ones, much less memory."""

    def rerun(self, predictions: Tensor | Sequence[Tensor], cotangents: Tensor, selected: Tensor) -> Gradients:
        """Run the selected poses again and return `sum_i cotangents[i] dy_i/dtheta` for each leaf.

        Call it in `Accumulation.gradients`. Model state, random state and autocast are those of the first run, and are
        restored afterwards.

        Args:
            predictions: Shape `(N, *prediction)`: those of the first run, with which the second run is compared; or
                what `tensors_to_compare` returned for them.
            cotangents: Shape `(N, *prediction)`.
            selected: Shape `(N,)`, bool, on the CPU.

        Raises:
            ReplayError: A second run gave other predictions.
        """

    def add_zeros_for_skipped(self, gradients: Gradients, skipped: Tensor) -> None:
        """Replace None by zeros in `gradients` for leaves that only skipped poses, shape `(N,)`, bool, reach."""

    def reached_leaves(self, predictions: Tensor) -> set[int]:
        """Return the indices of the leaves below live predictions."""

    def skip_threshold(self, dtype: torch.dtype) -> float:
        """Return the size relative to the largest coefficient below which a pose gets no backward.

        All such poses together change the result by less than half a rounding error, unless the option `tolerance`
        says otherwise.
        """

    def fp16_scale(self, predictions: Tensor) -> float:
        """Return a power of two by which to scale the cotangents of a backward that runs before the loss is known.

        The gradients of a mean of N poses are small. In float16 most would underflow, where a backward after the loss
        is protected by the scale of a `GradScaler`. The scale is 1 without float16.
        """


class Accumulator(ABC):
    """A way to accumulate. An instance holds options and what it has learned, and serves many batches.

    Attributes:
        name: The name in the report.
        ignored_options: Names of the options of `MultiPose` that this accumulator does not use; setting one is an
            error.
        supports_sharded: Whether the second run may take its place where parameters are sharded over ranks.
        uses_plain_chunks: Whether poses whose graphs fit in `memory` run plainly, without this accumulator.
    """

    name: ClassVar[str]
    ignored_options: ClassVar[frozenset[str]] = frozenset()
    supports_sharded: ClassVar[bool] = False
    uses_plain_chunks: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def begin(self, engine: Engine, predictions: Tensor) -> Accumulation:
        """Begin a batch whose first chunk has just run.

        Args:
            engine: The batch.
            predictions: Live, shape `(n, *prediction)`: the first chunk, which `Accumulation.add` gets next.
        """

    def begin_plain(self) -> None:  # noqa: B027 - may be left out
        """Begin a batch of which poses may run plainly; `begin` follows if not all do."""

    def observe_plain(self, coefficients: Tensor) -> None:
        """Take note of the coefficients, shape `(n, *prediction)`, of poses that ran plainly.

        Called in the outer backward. It must not wait for the device.
        """
        del coefficients

    def learned(self) -> dict[str, Any]:
        """Return what earlier batches have shown, in plain values, where it changes how later batches run.

        It is part of `MultiPose.learned`: numbers, strings, tensors on the CPU and containers of them.
        """
        return {}

    def learn_from(self, values: Mapping[str, Any]) -> None:
        """Go on with what `learned` has returned in another process."""
        del values


def set_accumulator(engine: Engine, name: str, reason: str) -> None:
    """Write to the report which accumulator does the work, and why."""
    engine.report.accumulator, engine.report.reason = name, reason
    logger.debug("{} poses by {}: {}", engine.pose_count, name, reason)


def refuse_nonlinear_backward(engine: Engine, accumulator: str) -> None:
    """Refuse a model whose backward is not linear, by an accumulator that runs it before coefficients are known.

    Raises:
        NonlinearBackwardError: It is not.
    """
    if not engine.findings.linear:
        raise NonlinearBackwardError(
            "the gradient of this model is not proportional to the gradient of its prediction: a hook clamps it, or a "
            f"function adds a loss of its own in its backward. The accumulator {accumulator!r} runs backwards before "
            "the loss is known, or runs some for zeros; use accumulator='auto' or 'recompute' without shards, or allow "
            "enough memory= for poses to run plainly"
        )


def refuse_gradient_combination(engine: Engine, accumulator: str) -> None:
    """Refuse a batch whose combination needs the gradients of the poses.

    Raises:
        CombinationError: It defines `combine_gradients`.
    """
    if engine.combination.combine_gradients is not None:
        raise CombinationError(
            f"combination {engine.combination.name} defines combine_gradients, which needs the gradient of every pose; "
            f"the accumulator {accumulator!r} keeps none of them, use accumulator='store' or 'auto'"
        )

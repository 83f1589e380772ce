"""One group on its way through the model: everything an accumulator may ask for."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.distributed.pose_parallel import PosePartition
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.engine.chunk_sizes import ChunkSizes
from gradhooks.engine.graph_leaves import nodes_of, other_leaves, reached_inside, reached_leaves
from gradhooks.engine.model_state import ModelState, Snapshot
from gradhooks.engine.nested import map_tensors, tensors_in
from gradhooks.engine.pose_inputs import Call, Nonfinite, Poses, prediction_rows
from gradhooks.engine.progress import Progress
from gradhooks.engine.report import Report
from gradhooks.engine.shadow_parameters import ShadowParameters
from gradhooks.engine.training_flags import Modes, in_modes
from gradhooks.errors import PosesError
from gradhooks.numerics import wide

_WANTS_GRAD = ".*(does not require grad|None of the inputs have requires_grad)"


class NeedsGradModeError(Exception):
    """Inside gradhooks only: a forward without grad mode cannot serve this model."""


class Chunk(NamedTuple):
    """The poses `start .. stop - 1`, which went through the model together, and the state before they did."""

    start: int
    stop: int
    before: Snapshot


@dataclass
class Group:
    """What belongs to one group from its forward to its outer backward.

    Attributes:
        model: The bare model.
        call: How a pose reaches it.
        poses: The poses of this process; what requires grad in them is cut from what produced it.
        share: Which of the whole group's they are.
        sharding: How the model's parameters are spread over ranks.
        shadows: The leaves in which the backward of every pose ends.
        replay: Takes and restores what a second forward needs.
        combination: The combination, with the arguments of this call.
        tolerance: Weight relative to the largest below which a pose does not matter; None is the default.
        nonfinite: What becomes of predictions that are not finite.
        progress: How to tell the user.
        report: What became of the poses.
        modes: Training flags, which the user may have changed when the backward comes.
        sizes: How many poses go through the model at once.
        makes_leaves: Whether the model makes leaves of its own, or of its inputs, to differentiate by.
        needs_grad_mode: Whether the model cannot run without grad mode.
        tried_graphless: Whether that was tried.
        looked_inside: Whether anybody looked for leaves inside reentrant checkpoints, which costs a forward.
        ends: Where the graph ends for the leaves.
        steady: Whether no pose drew random numbers or wrote a buffer, so that they may be run again in any order.
        declarations: What the combination declared for so many of the first poses.
        finished: Called with the group, its predictions and its coefficients after each outer backward.
    """

    model: nn.Module
    call: Call
    poses: Poses
    share: PosePartition
    sharding: ShardedModel
    shadows: ShadowParameters
    replay: ModelState
    combination: BoundCombination
    tolerance: float | None
    nonfinite: Nonfinite
    progress: Progress
    report: Report
    modes: Modes
    sizes: ChunkSizes
    makes_leaves: bool = False
    needs_grad_mode: bool = False
    tried_graphless: bool = False
    looked_inside: bool = False
    ends: set[Any] = field(default_factory=set)
    steady: bool = False
    declarations: dict[int, Any] = field(default_factory=dict)
    finished: list[Callable[..., None]] = field(default_factory=list)

    def forget(self, before: Snapshot) -> None:
        """Put everything back to the state before an attempt that failed."""
        self.replay.restore(before)
        self.shadows.forget()
        self.report.backwards = self.report.recomputed = self.report.retained = 0
        self.finished.clear()
        self.declarations.clear()

    def run(self, start: int, stop: int) -> Tensor:
        """The predictions of some poses, shape `(stop - start, *prediction)`, in the present grad mode and state."""
        inputs = self.poses.between(start, stop)
        if self.makes_leaves:
            inputs = map_tensors(self._lent, inputs)
        before = [(tensor, path, tensor._version) for path, tensor in tensors_in(inputs)]
        try:
            output = self.call(self.model, inputs)
        except Exception as fault:
            if hasattr(fault, "add_note"):  # Python 3.11
                pose = self.poses.number(start)
                fault.add_note(f"gradhooks: this was pose {pose} of a group of {self.report.poses} (counted from 0)")
            raise
        changed = [path for tensor, path, version in before if tensor._version != version]
        if changed:
            raise PosesError(
                f"pose {start}: the model changed {', '.join(changed)} in place, so that the pose cannot be run again; "
                "let it work on a copy (clone), or pass one with call=lambda model, pose: ..."
            )
        return prediction_rows(output, start, stop, self.poses.batched)

    def run_graphless(self, start: int, stop: int) -> Tensor:
        """The same, without a graph that outlives the call.

        Raises:
            NeedsGradModeError: The model differentiates in its forward (forces, reentrant checkpoints), and the whole
                group must be run with grad mode.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.needs_grad_mode))
            if not self.tried_graphless:  # each time would make Python forget which warnings it has shown
                self.tried_graphless = True
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("error", message=_WANTS_GRAD)
            try:
                return self.run(start, stop).detach()
            except (RuntimeError, UserWarning) as fault:
                if self.needs_grad_mode or not re.search(_WANTS_GRAD, str(fault)):
                    raise
                raise NeedsGradModeError from fault

    def _lent(self, tensor: Tensor) -> Tensor:
        """An alias that the model may mark as requiring grad, and get gradients in, without the user's own doing so."""
        return tensor if tensor.grad_fn is not None or self.shadows.owns(tensor) else tensor.detach()

    def reached(self, predictions: Tensor, *, inside_checkpoints: bool) -> list[Tensor]:
        """The leaves that some predictions depend on; those inside reentrant checkpoints cost one more forward."""
        leaves, checkpoints = reached_leaves(predictions)
        if inside_checkpoints and checkpoints:
            with self.replay.undone():
                leaves += [leaf for checkpoint in checkpoints for leaf in reached_inside(checkpoint)]
        return leaves

    def strangers(self, predictions: Tensor, *, inside_checkpoints: bool) -> list[Tensor]:
        """The leaves that some predictions depend on and nothing stands in for."""
        if inside_checkpoints:
            reached = self.reached(predictions, inside_checkpoints=True)
            return [leaf for leaf in reached if not self.shadows.owns(leaf)]
        self.ends = self.ends or nodes_of(self.shadows.leaves)
        return other_leaves(predictions, self.ends)

    def known_storages(self) -> set[int]:
        """Addresses of what is there anyway."""
        return storages_of(self.model, self.shadows.leaves)

    def names(self) -> dict[int, str]:
        """Names by the id of a real leaf: of a parameter its own, the first where it is tied."""
        real = {id(leaf): id(real) for leaf, real in zip(self.shadows.leaves, self.shadows.real, strict=True)}
        names = {id(tensor): f"input {place}" for place, tensor in enumerate(self.shadows.inputs)}
        for path, module in self.model.named_modules():
            for name, parameter in module._parameters.items():  # real ones, or shadows where those are swapped in
                names.setdefault(real.get(id(parameter), id(parameter)), f"{path}.{name}" if path else name)
        return names

    @contextmanager
    def rerunning(self) -> Iterator[None]:
        """Shadows in, grad mode and autocast as in the forward; everything as before at the end."""
        with self.shadows, self.replay.undone(), in_modes(self.modes), torch.enable_grad(), self.replay.autocast():
            yield

    def backward(self, predictions: Tensor, cotangents: Tensor, *, retain_graph: bool = False) -> None:
        """Send `cotangents`, of the shape of `predictions`, down to the leaves."""
        if cotangents.dtype != predictions.dtype or cotangents.device != predictions.device:
            cotangents = cotangents.to(predictions, non_blocking=True)
        self.shadows.receives = True
        try:
            with self.replay.no_autocast():
                torch.autograd.backward(predictions, cotangents, retain_graph=retain_graph)
        finally:
            self.shadows.receives = False

    def skip_threshold(self, dtype: torch.dtype) -> float:
        """Weight relative to the largest below which a pose does not matter.

        All such poses together stay below half a rounding error of the result.
        """
        if self.tolerance is not None:
            return self.tolerance
        return torch.finfo(wide(dtype)).eps / 2 / self.share.total

    def fp16_scale(self, predictions: Tensor) -> float:
        """A power of two by which cotangents of a backward that runs before the loss is known are scaled up.

        The gradients of a sum of N poses, or of a mean, are small; in float16 most would underflow, where a backward
        after the loss is saved by the scale of a `GradScaler`.
        """
        half = predictions.dtype == torch.float16 or torch.float16 in self.replay.autocast_dtypes
        half = half or any(leaf.dtype == torch.float16 for leaf in self.shadows.leaves)
        return 2.0**12 if half else 1.0


def storages_of(model: nn.Module, others: Iterable[Tensor] = ()) -> set[int]:
    """Addresses of what a model holds, and other tensors."""
    held = chain(others, model.parameters(), model.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in held}

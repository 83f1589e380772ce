"""One group on its way through the model: everything an accumulator may ask for."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.combination import BoundCombination
from gradhooks.errors import PosesError
from gradhooks.poses import Call, Nonfinite, Poses, prediction_rows
from gradhooks.progress import Progress
from gradhooks.replay import Replay, Snapshot
from gradhooks.report import GroupReport
from gradhooks.shadow import ShadowParameters
from gradhooks.trees import tensors_in

_WANTS_GRAD = ".*(does not require grad|None of the inputs have requires_grad)"


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
        poses: The poses; what requires grad in them is cut from what produced it.
        shadows: The leaves in which the backward of every pose ends.
        replay: Takes and restores what a second forward needs.
        combination: The combination, with the arguments of this call.
        tolerance: Weight relative to the largest below which a pose does not matter; None is the default.
        nonfinite: What becomes of predictions that are not finite.
        progress: How to tell the user.
        report: What became of the poses.
        only_leaves: Whether backwards must be kept out of every other leaf.
        needs_grad_mode: Whether the model cannot run without grad mode, since it differentiates in its forward; None
            until that was tried.
        finished: Called with the group, its predictions and its coefficients after each outer backward.
    """

    model: nn.Module
    call: Call
    poses: Poses
    shadows: ShadowParameters
    replay: Replay
    combination: BoundCombination
    tolerance: float | None
    nonfinite: Nonfinite
    progress: Progress
    report: GroupReport
    only_leaves: bool = False
    needs_grad_mode: bool | None = None
    finished: list[Callable[..., None]] = field(default_factory=list)

    def run(self, start: int, stop: int) -> Tensor:
        """The predictions of some poses, shape `(stop - start, *prediction)`, in the present grad mode and state."""
        inputs = self.poses.between(start, stop)
        before = [(tensor, path, tensor._version) for path, tensor in tensors_in(inputs)]
        try:
            output = self.call(self.model, inputs)
        except Exception as fault:
            if hasattr(fault, "add_note"):  # Python 3.11
                fault.add_note(f"gradhooks: this was pose {start} of a group of {len(self.poses)} (counted from 0)")
            raise
        changed = [path for tensor, path, version in before if tensor._version != version]
        if changed:
            raise PosesError(
                f"pose {start}: the model changed {', '.join(changed)} in place, so that the pose cannot be run again; "
                "let it work on a copy (clone), or pass one with call=lambda model, pose: ..."
            )
        return prediction_rows(output, start, stop, self.poses.batched)

    def run_graphless(self, start: int, stop: int) -> Tensor:
        """The same, without a graph that outlives the call."""
        if self.needs_grad_mode is None:
            try:
                with torch.no_grad(), self.replay.undone(unless_it_succeeds=True), warnings.catch_warnings():
                    warnings.filterwarnings("error", message=_WANTS_GRAD)
                    predictions = self.run(start, stop)
                self.needs_grad_mode = False
                return predictions
            except (RuntimeError, UserWarning) as fault:
                # Forces in the forward, or reentrant checkpoints; every other fault is the model's own.
                if not re.search(_WANTS_GRAD, str(fault)):
                    raise
                self.needs_grad_mode = True
        with torch.set_grad_enabled(self.needs_grad_mode):
            return self.run(start, stop).detach()

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
        with self.shadows, self.replay.undone(), torch.enable_grad(), self.replay.autocast():
            yield

    def backward(self, predictions: Tensor, cotangents: Tensor, *, retain_graph: bool = False) -> None:
        """Send `cotangents`, of the shape of `predictions`, down to the leaves."""
        leaves = self.shadows.leaves if self.only_leaves else None
        cotangents = cotangents.to(predictions, non_blocking=True)
        with self.replay.no_autocast():
            torch.autograd.backward(predictions, cotangents, retain_graph=retain_graph, inputs=leaves)

    def negligible(self, dtype: torch.dtype) -> float:
        """Weight relative to the largest below which a pose does not matter.

        All such poses together stay below half a rounding error of the result.
        """
        if self.tolerance is not None:
            return self.tolerance
        return torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2 / len(self.poses)

    def underflow_guard(self, predictions: Tensor) -> float:
        """A power of two by which cotangents of a backward that runs before the loss is known are scaled up.

        The gradients of a sum of N poses, or of a mean, are small; in float16 most would underflow, where a backward
        after the loss is saved by the scale of a `GradScaler`.
        """
        half = predictions.dtype == torch.float16 or self.replay.autocasts_to_half
        half = half or any(leaf.dtype == torch.float16 for leaf in self.shadows.leaves)
        return 2.0**12 if half else 1.0

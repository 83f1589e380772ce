"""PoseRunner: one forward of the model."""

import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.engine.leaves import Leaves
from gradhooks.engine.memory_need import MemoryNeed
from gradhooks.engine.nested import fresh_containers, map_tensors, tensors_in
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.saved_tensors import storage_addresses
from gradhooks.engine.side_outputs import Layout, check_layout, output_rows
from gradhooks.engine.tensor_records import version_of
from gradhooks.errors import PosesError
from gradhooks.options import Call, call_model

_NEEDS_GRAD = ".*(does not require grad|None of the inputs have requires_grad)"


def _inputs(poses: Poses, start: int, stop: int) -> Any:
    """Return the model's input; what the model writes into its containers does not reach the user's poses."""
    inputs = poses.slice(start, stop)
    return inputs if poses.collated else fresh_containers(inputs)


_Versions = list[tuple[Tensor, str, int]]
"""Tensors of a pose, their paths, and their versions before the model ran."""


def _versions(inputs: Any) -> _Versions:
    return [(tensor, path, version_of(tensor)) for path, tensor in tensors_in(inputs)]


def _changed(versions: _Versions) -> list[str]:
    """Return the paths of the tensors that were changed in place since."""
    return [path for tensor, path, version in versions if version_of(tensor) != version]


class NeedsGradModeError(Exception):
    """Internal: the model cannot run without grad mode."""


class PlainRun(NamedTuple):
    """What `PoseRunner.run_plainly` returns.

    Attributes:
        predictions: Shape `(n, *prediction)`, with the graph that the model built.
        bytes: What the graph keeps, measured or expected from earlier chunks.
    """

    predictions: Tensor
    bytes: int


class PoseRunner:
    """Runs chunks of a batch through the model.

    Args:
        model: The bare model.
        call: The option `call`.
        pose_count: The number of poses, for messages.
        need: Measures what poses need.

    Attributes:
        measures: Whether larger inputs than all before are measured.
        layout: What a row contains if poses have a side; None if not, or before the first run.
    """

    def __init__(self, model: nn.Module, call: Call, pose_count: int, need: MemoryNeed) -> None:
        self._model = model
        self._call = call
        self._pose_count = pose_count
        self._need = need
        self.measures = True
        self.layout: Layout | None = None
        self._has_run = False
        self._detach_for: Leaves | None = None
        self._needs_grad_mode = False
        self._tried_without_graph = False
        self._changed_poses: PosesError | None = None

    @property
    def detaches_inputs(self) -> bool:
        """Whether the model gets detached aliases of the tensors in a pose."""
        return self._detach_for is not None

    def detach_inputs(self, leaves: Leaves) -> None:
        """Pass detached aliases from now on: the model makes leaves of its own, or of its inputs.

        The model may then mark them as requiring grad without changing the user's tensors. `leaves` stay as they are.
        """
        self._detach_for = leaves

    def require_grad_mode(self) -> None:
        """Run every forward with grad mode from now on: the model differentiates in its forward."""
        self._needs_grad_mode = True

    def run(self, poses: Poses, start: int, stop: int) -> Tensor:
        """Return the predictions of some poses, shape `(stop - start, *prediction)`, in the present grad mode.

        Raises:
            PosesError: The model changed a tensor of a pose in place.
            PredictionError: The output cannot be used as a prediction.
        """
        inputs = _inputs(poses, start, stop)
        if self._detach_for is not None:
            inputs = map_tensors(self._detach_input, inputs)
        versions = _versions(inputs)
        size = sum([tensor.nbytes for tensor, _, _ in versions])
        predictions = self._predict_measured(inputs, size, poses, start, stop)
        if changed := _changed(versions):
            raise _changed_in_place(poses.original_index(start), changed)
        return predictions

    def refuse_changed_poses(self) -> None:
        """Refuse to run poses again that the model changed in place when they ran plainly.

        Raises:
            PosesError: It did.
        """
        if self._changed_poses is not None:
            raise self._changed_poses

    def run_plainly(self, poses: Poses, start: int, stop: int, room: int | None, *, measure: bool) -> PlainRun:
        """Run some poses that will not run again, and may be changed in place.

        Args:
            poses: The poses.
            start: The index of the first.
            stop: The index after the last; fewer poses run if these are expected to need more than `room`.
            room: The bytes that their graph may keep; None if all of them must run together.
            measure: Measure the need even if larger inputs were measured before.
        """
        inputs = _inputs(poses, start, stop)
        versions = _versions(inputs)
        count, size = stop - start, sum([tensor.nbytes for tensor, _, _ in versions])
        expected = self._need.expected_graph(size, count)
        if room is not None and expected > room and count > 1:
            return self.run_plainly(poses, start, start + max(1, count * room // expected), room, measure=True)

        def forward() -> Tensor:
            try:
                return self._predict(inputs, poses, start, stop)
            finally:
                if not poses.collated and (changed := _changed(versions)):
                    self._changed_poses = _changed_in_place(poses.original_index(start), changed)

        if self.measures and (measure or self._need.is_unmeasured(size, count)):
            excluded = self._not_counted(poses, inputs)
            return PlainRun(*self._need.measure(forward, size, count, excluded))
        return PlainRun(forward(), expected)

    def _predict_measured(self, inputs: Any, size: int, poses: Poses, start: int, stop: int) -> Tensor:
        """Return the predictions; measure them if they have a graph and are larger than those before.

        `size` is the number of bytes of the tensors in `inputs`.
        """
        count = stop - start
        if self.measures and torch.is_grad_enabled() and self._need.is_unmeasured(size, count):
            excluded = self._not_counted(poses, inputs)
            return self._need.measure(lambda: self._predict(inputs, poses, start, stop), size, count, excluded)[0]
        return self._predict(inputs, poses, start, stop)

    def _not_counted(self, poses: Poses, inputs: Any) -> set[int]:
        """Return the addresses of storages that exist anyway: the model's, and those of poses that are not copied."""
        own = [] if poses.collated else [tensor for _, tensor in tensors_in(inputs)]
        if poses.loaded:  # only a part of a larger storage is memory that the source holds
            own = [tensor for tensor in own if tensor.untyped_storage().nbytes() > tensor.nbytes]
        return storage_addresses(self._model, own)

    def _predict(self, inputs: Any, poses: Poses, start: int, stop: int) -> Tensor:
        try:
            output = self._call(self._model, inputs)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                index = poses.original_index(start)
                error.add_note(f"gradhooks: this was pose {index} of {self._pose_count} (counted from 0)")
            raise
        rows, layout = output_rows(output, start, stop, poses.batched, may_have_side=self._call is not call_model)
        if not self._has_run:
            self._has_run, self.layout = True, layout
        if layout is not None or self.layout is not None:
            check_layout(self.layout, layout, poses.original_index(start))
        return rows

    def run_without_graph(self, poses: Poses, start: int, stop: int) -> Tensor:
        """Return the predictions as `run` does, detached, without a graph that outlives the call.

        Raises:
            NeedsGradModeError: The model differentiates in its forward (forces, reentrant checkpoints).
        """
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._needs_grad_mode))
            if not self._tried_without_graph:  # once, since catch_warnings resets Python's record of shown warnings
                self._tried_without_graph = True
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("error", message=_NEEDS_GRAD)
            try:
                return self.run(poses, start, stop).detach()
            except (RuntimeError, UserWarning) as error:
                if self._needs_grad_mode or not re.search(_NEEDS_GRAD, str(error)):
                    raise
                raise NeedsGradModeError from error

    def _detach_input(self, tensor: Tensor) -> Tensor:
        kept = tensor.grad_fn is not None or (self._detach_for is not None and self._detach_for.contain(tensor))
        return tensor if kept else tensor.detach()


def _changed_in_place(index: int, changed: Sequence[str]) -> PosesError:
    return PosesError(
        f"pose {index}: the model changed {', '.join(changed)} in place, so the pose cannot be run again; let the "
        "model work on a copy (clone), or pass one with call=lambda model, pose: ..."
    )

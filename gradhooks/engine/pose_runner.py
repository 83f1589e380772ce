"""PoseRunner: one forward of the model."""

import re
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.engine.model_output import prediction_rows
from gradhooks.engine.nested import map_tensors, tensors_in
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.shadow_parameters import ShadowParameters
from gradhooks.errors import PosesError
from gradhooks.options import Call

_NEEDS_GRAD = ".*(does not require grad|None of the inputs have requires_grad)"


class NeedsGradModeError(Exception):
    """Internal: the model cannot run without grad mode."""


class PoseRunner:
    """Runs chunks of a group through the model.

    Args:
        model: The bare model.
        call: The option `call`.
        shadows: The leaves of the group.
        pose_count: The number of poses, for messages.
        detach_inputs: Whether the model gets detached aliases of the tensors in a pose, which it may mark as requiring
            grad without changing the user's tensors.
    """

    def __init__(
        self, model: nn.Module, call: Call, shadows: ShadowParameters, pose_count: int, *, detach_inputs: bool = False
    ) -> None:
        self._model = model
        self._call = call
        self._shadows = shadows
        self._pose_count = pose_count
        self._detach_inputs = detach_inputs
        self._needs_grad_mode = False
        self._tried_without_graph = False

    @property
    def detaches_inputs(self) -> bool:
        """Whether the model gets detached aliases of the tensors in a pose."""
        return self._detach_inputs

    def detach_inputs(self) -> None:
        """Pass detached aliases from now on: the model makes leaves of its own, or of its inputs."""
        self._detach_inputs = True

    def require_grad_mode(self) -> None:
        """Run every forward with grad mode from now on: the model differentiates in its forward."""
        self._needs_grad_mode = True

    def run(self, poses: Poses, start: int, stop: int) -> Tensor:
        """Return the predictions of some poses, shape `(stop - start, *prediction)`, in the present grad mode.

        Raises:
            PosesError: The model changed a tensor of a pose in place.
            PredictionError: The output cannot be used as a prediction.
        """
        inputs = poses.slice(start, stop)
        if self._detach_inputs:
            inputs = map_tensors(self._detach_input, inputs)
        versions = [(tensor, path, tensor._version) for path, tensor in tensors_in(inputs)]
        predictions = self._call_model(inputs, poses, start, stop)
        changed = [path for tensor, path, version in versions if tensor._version != version]
        if changed:
            raise PosesError(
                f"pose {poses.original_index(start)}: the model changed {', '.join(changed)} in place, so the pose "
                "cannot be run again; let the model work on a copy (clone), or pass one with "
                "call=lambda model, pose: ..."
            )
        return predictions

    def predict(self, poses: Poses, start: int, stop: int) -> Tensor:
        """Return the predictions as `run` does, of poses that will not run again and may be changed in place."""
        return self._call_model(poses.slice(start, stop), poses, start, stop)

    def _call_model(self, inputs: Any, poses: Poses, start: int, stop: int) -> Tensor:
        try:
            output = self._call(self._model, inputs)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                index = poses.original_index(start)
                error.add_note(f"gradhooks: this was pose {index} of a group of {self._pose_count} (counted from 0)")
            raise
        return prediction_rows(output, start, stop, poses.batched)

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
        return tensor if tensor.grad_fn is not None or self._shadows.is_shadow(tensor) else tensor.detach()

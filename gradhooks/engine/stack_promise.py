"""A stack of poses promises that the model returns a row per pose. The tensors of one pose do not keep it."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from gradhooks.engine.learned import Learned, StackForm
from gradhooks.engine.model_state import ModelState
from gradhooks.engine.nested import independent_copy, tensors_in
from gradhooks.engine.parametrization_cache import uncached_parametrizations
from gradhooks.engine.pose_inputs import Poses, StackedPoses
from gradhooks.errors import PosesError
from gradhooks.options import Options

_PAIR = 2


def refuse_broken_promise(
    model: nn.Module, poses: Poses, options: Options, state: ModelState, learned: Learned
) -> None:
    """Refuse stacked poses for which the model does not return a row per pose.

    A chunk of one pose does not show it, since the tensors of one pose can be sliced too: into its atoms. So the first
    two rows run together once, without a trace, for each form of poses: dtypes and numbers of axes of their tensors.

    Raises:
        PosesError: The model returns another number of rows than two.
    """
    if options.collate is not None or not poses.batched or len(poses) < _PAIR or (options.chunk_size or 1) > 1:
        return
    form = _form_of(poses)
    if form in learned.row_per_pose:
        return
    inputs = poses.slice(0, _PAIR)
    with uncached_parametrizations(), state.preserved(probe=True):
        output = _run(model, inputs, options)
        state.end_probe()
        output = output[0] if isinstance(output, tuple) and output else output  # `call=` may return a side output
    if isinstance(output, Tensor) and (output.dim() == 0 or len(output) != _PAIR):
        raise PosesError(_describe(tuple(output.shape), inputs))
    learned.row_per_pose.add(form)


def _run(model: nn.Module, inputs: Any, options: Options) -> Any:
    """Return what the model makes of two rows; None if it fails, which says nothing about chunks of one."""
    for grad_mode in (False, True):  # without it two poses need less memory, but some models refuse that
        with suppress(Exception), torch.set_grad_enabled(grad_mode):
            return options.call(model, independent_copy(inputs))
    return None


def _form_of(poses: Poses) -> StackForm:
    if isinstance(poses, StackedPoses):
        return tuple([(1 + len(shape), str(dtype)) for shape, dtype in poses.shapes_and_dtypes()])
    return tuple([(tensor.dim(), str(tensor.dtype)) for _, tensor in tensors_in(poses.slice(0, _PAIR))])


def _describe(shape: tuple[int, ...], inputs: Any) -> str:
    kind, one = ("tensor", "poses.unbind()") if isinstance(inputs, Tensor) else ("mapping", "[{...}, {...}]")
    return (
        f"for two poses at once the model returned shape {shape}, not two rows. A {kind} holds stacked poses: axis 0 "
        f"is the pose, and the model returns a row for each. Is this {kind} one pose? Then pass [pose]. If the "
        f"model takes single poses without that axis, pass a list: {one}"
    )

"""Make `Poses` of the forms in which a user may pass poses."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradhooks.engine.loaded_poses import LoadedPoses
from gradhooks.engine.model_output import describe
from gradhooks.engine.nested import is_graph, tensors_in
from gradhooks.engine.pose_inputs import ListedPoses, Poses, Stack, StackedPoses, stack_length
from gradhooks.engine.pose_sources import source_of
from gradhooks.errors import PosesError
from gradhooks.options import Collate


def as_poses(
    poses: Any,
    collate: Collate | None,
    *,
    may_be_empty: bool = False,
    count: int | None = None,
    devices: Iterable[torch.device] = (torch.device("cpu"),),
) -> Poses:
    """Return the user's poses as the engine slices them.

    Args:
        poses: What the user passed: an iterable of poses, or a stack.
        collate: Makes the model's input from a list of poses.
        may_be_empty: Whether there may be no poses.
        count: The number of poses, if something else than the poses says so.
        devices: Those of the model.

    Raises:
        PosesError: `poses` is empty, is neither an iterable nor a stack, or is a stack although `collate` is given.
    """
    if isinstance(poses, (Tensor, Mapping)):
        length = stack_length(poses)
        if length == 0 and not may_be_empty:
            raise PosesError(
                "there are no poses: the tensors have 0 rows along axis 0; a group needs at least one pose"
            )
        if collate is not None:
            raise PosesError(
                "collate= makes a batch from a list of poses, and these poses are already stacked in "
                f"{describe(poses)}; pass a list of poses, or MultiPose without collate="
            )
        if not _any_requires_grad(poses):
            return StackedPoses(poses, length=length)
        # Each slice would send back a gradient of the size of the whole stack; the backward of unbind stacks them once.
        poses, collate = _unstack(poses, length), _stack
    elif isinstance(poses, (str, bytes)) or is_graph(poses) or not _is_iterable(poses):
        raise PosesError(
            f"poses must be an iterable of poses, a tensor or a mapping of tensors, got one {type(poses).__name__}; "
            "pass a list of poses (for a batch of PyTorch Geometric: batch.to_data_list())"
        )
    source = source_of(poses, count, devices)
    if source is not None and not (source.keeps and _any_in_pose_requires_grad(source.read([0])[0])):
        return LoadedPoses(source, collate)
    listed = list(poses) if source is None else source.read(range(len(source)))
    if not listed and not may_be_empty:
        raise PosesError("there are no poses: a group needs at least one pose")
    return ListedPoses(listed, collate)


def _any_requires_grad(stack: Stack) -> bool:
    tensors = [stack] if isinstance(stack, Tensor) else stack.values()
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _any_in_pose_requires_grad(pose: Any) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in tensors_in(pose))


def _unstack(stack: Stack, length: int) -> list[Any]:
    if isinstance(stack, Tensor):
        return list(stack.unbind())
    columns = {name: tensor.unbind() for name, tensor in stack.items()}
    return [{name: column[index] for name, column in columns.items()} for index in range(length)]


def _stack(poses: list[Any]) -> Any:
    if isinstance(poses[0], Tensor):
        return torch.stack(poses)
    return {name: torch.stack([pose[name] for pose in poses]) for name in poses[0]}


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")

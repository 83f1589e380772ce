"""Poses in any form, cut into what goes through the model at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gradhooks.engine.nested import map_tensors
from gradhooks.errors import PosesError, PredictionError

Collate = Callable[[list[Any]], Any]
Nonfinite = Literal["propagate", "raise", "drop"]
Call = Callable[[nn.Module, Any], Tensor]


class Poses(Protocol):
    """A group's poses. `batched` says that the model's output has a row for each."""

    batched: bool

    def __len__(self) -> int: ...

    def between(self, start: int, stop: int) -> Any:
        """What the model gets for the poses `start .. stop - 1`."""

    def at(self, places: list[int]) -> Any:
        """What the model gets for some poses."""

    def number(self, place: int) -> int:
        """What number a pose has for the user."""

    def cut(self, cut: Callable[[Tensor], Tensor]) -> "Poses":
        """The same poses, `cut` applied to each tensor."""


class StackedPoses:
    """A tensor, or a mapping of tensors, with the poses along axis 0."""

    batched = True

    def __init__(self, stack: Tensor | Mapping[str, Tensor]) -> None:
        self._stack = stack
        self._length = _stack_length(stack)

    def __len__(self) -> int:
        return self._length

    def between(self, start: int, stop: int) -> Any:
        return map_tensors(lambda tensor: tensor[start:stop], self._stack)

    def at(self, places: list[int]) -> Any:
        return map_tensors(lambda tensor: tensor[places], self._stack)

    def number(self, place: int) -> int:
        return place

    def cut(self, cut: Callable[[Tensor], Tensor]) -> "Poses":
        return StackedPoses(map_tensors(cut, self._stack))


class ListedPoses:
    """Poses one by one, of any type; `collate` makes a batch of some."""

    def __init__(self, poses: Sequence[Any], collate: Collate | None) -> None:
        self._poses = poses
        self._collate = collate
        self.batched = collate is not None

    def __len__(self) -> int:
        return len(self._poses)

    def between(self, start: int, stop: int) -> Any:
        return self.at(list(range(start, stop)))

    def at(self, places: list[int]) -> Any:
        if self._collate is not None:
            return self._collate([self._poses[place] for place in places])
        return self._poses[places[0]]

    def number(self, place: int) -> int:
        return place

    def cut(self, cut: Callable[[Tensor], Tensor]) -> "Poses":
        return ListedPoses([map_tensors(cut, pose) for pose in self._poses], self._collate)


def arrange(poses: Any, collate: Collate | None, *, may_be_empty: bool = False) -> Poses:
    """Bring a group into one of the two forms.

    Args:
        poses: What the user passed.
        collate: Makes a batch of a list of poses.
        may_be_empty: Whether a group may have no poses.

    Raises:
        PosesError: `poses` is empty, or neither an iterable nor a stack.
    """
    if isinstance(poses, (Tensor, Mapping)):
        length = _stack_length(poses)
        if length == 0 and not may_be_empty:
            raise PosesError(
                "the group is empty: its tensors have 0 poses along axis 0; a group needs at least one pose"
            )
        if not _any_requires_grad(poses):
            return StackedPoses(poses)
        # Slices would each send back a gradient of the whole stack; `unbind` assembles it once.
        poses, collate = _unstack(poses, length), _stack
    elif isinstance(poses, (str, bytes)) or hasattr(poses, "stores") or not _is_iterable(poses):
        raise PosesError(
            f"poses must be an iterable of poses, a tensor or a mapping of tensors, got one {type(poses).__name__}; "
            "pass a list of poses (for a batch of PyTorch Geometric: batch.to_data_list())"
        )
    listed = list(poses)
    if not listed and not may_be_empty:
        raise PosesError("the group is empty: a group needs at least one pose")
    return ListedPoses(listed, collate)


def call_model(model: nn.Module, pose: Any) -> Tensor:
    """How a pose reaches the model unless `call=` says otherwise."""
    if isinstance(pose, tuple):
        return model(*pose)  # type: ignore[no-any-return]
    if isinstance(pose, Mapping):
        return model(**pose)  # type: ignore[no-any-return]
    try:
        return model(pose)  # type: ignore[no-any-return]
    except TypeError as fault:
        if isinstance(pose, list) and hasattr(fault, "add_note"):  # Python 3.11
            fault.add_note(
                "gradhooks: a list is one argument, a tuple is passed as model(*pose); where poses were tuples, a "
                "DataLoader has made lists of them: tell it collate_fn=lambda group: group, with batch_size=None"
            )
        raise


def prediction_rows(output: Any, start: int, stop: int, batched: bool) -> Tensor:
    """The model's output for the poses `start .. stop - 1` as one tensor of shape `(stop - start, *prediction)`.

    Raises:
        PredictionError: The output is no floating-point tensor, or has no row for each pose.
    """
    where = f"pose {start}" if stop - start == 1 else f"poses {start} to {stop - 1}"
    if not isinstance(output, Tensor):
        raise PredictionError(
            f"{where}: the model returned {_describe(output)}, not a tensor; "
            "choose the prediction with call=lambda model, pose: model(pose)[...]"
        )
    if not output.is_floating_point():
        raise PredictionError(f"{where}: the prediction is {output.dtype}; gradients need a floating-point one")
    if not batched or (output.dim() == 0 and stop - start == 1):
        return output.unsqueeze(0)
    if output.dim() == 0 or len(output) != stop - start:
        raise PredictionError(
            f"{where}: a batch of {stop - start} must give {stop - start} rows, the model returned shape "
            f"{tuple(output.shape)}; if it takes single poses without a batch axis, pass a list of poses "
            "(for a stacked tensor: poses.unbind()) and no collate"
        )
    return output


def finite_rows(rows: Tensor) -> Tensor:
    """Which of the predictions, shape `(n, *prediction)`, are finite in all their numbers; shape `(n,)`, boolean."""
    return rows.isfinite().reshape(len(rows), -1).all(1)


def check_rows(first: Tensor, rows: Tensor, start: int, *, finite: bool) -> None:
    """Check the rows of a chunk that begins with pose `start`.

    Args:
        first: The rows of the first chunk.
        rows: The rows to check.
        start: The index of their first pose.
        finite: Whether they must be finite. To find out waits for the device.

    Raises:
        PredictionError: They have other shapes than the first, or are not finite.
    """
    if finite and not rows.isfinite().all():
        bad = int(finite_rows(rows).logical_not().nonzero()[0])
        raise PredictionError(
            f"pose {start + bad}: its prediction is not finite ({rows[bad].flatten().tolist()}); nonfinite='drop' "
            "leaves such poses out, nonfinite='propagate' lets them through"
        )
    if rows.shape[1:] != first.shape[1:]:
        raise PredictionError(
            f"pose {start}: its prediction has shape {tuple(rows.shape[1:])}, that of pose 0 {tuple(first.shape[1:])}; "
            "all poses of a group must give predictions of one shape"
        )


def _stack_length(stack: Tensor | Mapping[str, Tensor]) -> int:
    tensors = {"poses": stack} if isinstance(stack, Tensor) else stack
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise PosesError(
                f"a mapping of stacked poses must hold tensors with the poses along axis 0; {name!r} is "
                f"{_describe(tensor)}; pass a list of mappings instead, one for each pose"
            )
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise PosesError(f"stacked poses must agree in the length of axis 0, got {lengths}")
    return next(iter(lengths.values()), 0)


def _any_requires_grad(stack: Tensor | Mapping[str, Tensor]) -> bool:
    tensors = [stack] if isinstance(stack, Tensor) else stack.values()
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _unstack(stack: Tensor | Mapping[str, Tensor], length: int) -> list[Any]:
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


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(map(repr, value))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return f"one {type(value).__name__}"

"""collate_groups: from items of a dataset, a group each, to a batch of groups."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from gradhooks.errors import PosesError
from gradhooks.groups import Groups

FORMS = "a list of poses, a stacked tensor, or a mapping of stacked tensors"


def collate_groups(items: Sequence[Any]) -> Any:
    """Make a batch of groups; pass it to a DataLoader as `collate_fn`.

    >>> loader = DataLoader(dataset, batch_size=32, collate_fn=gradhooks.collate_groups)
    >>> for groups, targets in loader:
    ...     loss = (scorer(groups).combined - targets).square().mean()

    Args:
        items: `(poses, target)` for each group, or only its poses (not as a tuple of two). Poses are a list or a
            generator, a stacked tensor, or a mapping of stacked tensors, any number or none, in one form for all items.

    Returns:
        `(Groups, targets)`, where `targets` is what `torch.utils.data.default_collate` makes of the targets; or only
        the `Groups`.

    Raises:
        PosesError: The items are of different forms, or their poses cannot be concatenated.
    """
    pairs = [isinstance(item, tuple) and len(item) == 2 for item in items]  # noqa: PLR2004
    if any(pairs) and not all(pairs):
        raise PosesError(
            f"item {pairs.index(True)} is a pair of poses and target, item {pairs.index(False)} is not; every item "
            "must be (poses, target), or every item only poses"
        )
    if not pairs[0]:
        return _concatenate(list(items))
    return _concatenate([poses for poses, _ in items]), default_collate([target for _, target in items])


def _concatenate(parts: list[Any]) -> Groups:
    forms = [_form(number, poses) for number, poses in enumerate(parts)]
    for number, form in enumerate(forms):
        if form != forms[0]:
            raise PosesError(f"the poses of item 0 are {forms[0]}, those of item {number} {form}; use one form for all")
    poses, lengths = _CONCATENATE[forms[0]](parts)
    return Groups(poses, torch.arange(len(parts)).repeat_interleave(torch.tensor(lengths)), len(parts))


def _form(number: int, poses: Any) -> str:
    if isinstance(poses, Tensor):
        return "a tensor"
    if isinstance(poses, Mapping):
        return "a mapping"
    # `stores`: one graph of PyTorch Geometric, over whose attributes one can iterate
    if isinstance(poses, Iterable) and not isinstance(poses, (str, bytes)) and not hasattr(poses, "stores"):
        return "a list"
    raise PosesError(f"the poses of item {number} are one {type(poses).__name__}; they must be {FORMS}")


def _concatenate_lists(parts: list[Any]) -> tuple[list[Any], list[int]]:
    lists = [list(part) for part in parts]
    return [pose for listed in lists for pose in listed], [len(listed) for listed in lists]


def _concatenate_tensors(tensors: list[Any], name: str = "the stack") -> tuple[Tensor, list[int]]:
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise PosesError(f"{name} of item {number} must be a tensor with the poses along axis 0, got {tensor!r}")
        if tensor.shape[1:] != tensors[0].shape[1:]:
            raise PosesError(
                f"{name} of item 0 has poses of shape {tuple(tensors[0].shape[1:])}, of item {number} of shape "
                f"{tuple(tensor.shape[1:])}; pad them to one shape, or use lists of poses"
            )
    return torch.cat(tensors), [len(tensor) for tensor in tensors]


def _concatenate_mappings(mappings: list[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[int]]:
    keys = list(mappings[0])
    if not keys:
        raise PosesError(f"the poses of item 0 are an empty mapping; they must be {FORMS}")
    for number, mapping in enumerate(mappings):
        if set(mapping) != set(keys):
            raise PosesError(f"the poses of item 0 have the keys {keys}, those of item {number} {list(mapping)}")
    columns = {key: _concatenate_tensors([mapping[key] for mapping in mappings], f"{key!r}") for key in keys}
    lengths = [column_lengths for _, column_lengths in columns.values()]
    for number, of_item in enumerate(zip(*lengths, strict=True)):
        if len(set(of_item)) > 1:
            found = dict(zip(keys, of_item, strict=True))
            raise PosesError(f"item {number}: stacked poses must agree in the length of axis 0, got {found}")
    return {key: stack for key, (stack, _) in columns.items()}, lengths[0]


_CONCATENATE: dict[str, Callable[[list[Any]], tuple[Any, list[int]]]] = {
    "a list": _concatenate_lists,
    "a tensor": _concatenate_tensors,
    "a mapping": _concatenate_mappings,
}

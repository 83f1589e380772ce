"""Say in words which poses a batch has, for the report; refuse groups that were passed as nested lists."""

import functools
from typing import Any

from torch import Tensor

from gradhooks.engine.pose_inputs import Poses, StackedPoses
from gradhooks.errors import PosesError

INSPECTED = 4
"""How many poses of a list are looked at, in every batch; of a longer list the first one alone."""


def describe_poses(poses: Poses) -> str:
    """Return such as `4 poses of shape (5, 16)`, with the shapes of all tensors in a pose."""
    count = len(poses)
    described = f"{count} pose" if count == 1 else f"{count} poses"
    if isinstance(poses, StackedPoses):
        return described + _with_shapes(tuple([shape for shape, _ in poses.shapes_and_dtypes()]), "of")
    few = count <= INSPECTED
    shapes = [_shapes(poses.narrow(index, index + 1)) for index in range(count if few else 1)]
    alike = few and all(each == shapes[0] for each in shapes)
    return described + (_with_shapes(shapes[0], "of" if alike else ", the first of") if shapes else "")


def _shapes(poses: Poses) -> tuple[tuple[int, ...], ...]:
    shapes: list[tuple[int, ...]] = []

    def add(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    poses.map_tensors(add)
    return tuple(shapes)


@functools.lru_cache(maxsize=64)
def _with_shapes(shapes: tuple[tuple[int, ...], ...], preposition: str) -> str:
    if not shapes:
        return ""
    separator = "" if preposition.startswith(",") else " "
    return f"{separator}{preposition} shape{'s' * (len(shapes) > 1)} {', '.join(str(tuple(shape)) for shape in shapes)}"


def refuse_nested_groups(first: Any) -> None:
    """Refuse poses of which the first is a list of poses.

    Raises:
        PosesError: It is. Lists of numbers or words are no lists of poses.
    """
    if isinstance(first, list) and not any(isinstance(part, (int, float, complex, str, bytes)) for part in first):
        raise PosesError(
            f"pose 0 is a list of {len(first)}. If the lists are groups: pass all poses in one list, with groups= (the "
            "group number of each pose), or let collate_groups make both in a DataLoader. If they were tuples that the "
            "collate function of a DataLoader has turned into lists: DataLoader(..., batch_size=None, "
            "collate_fn=lambda group: group). If a list is one pose: call=lambda model, pose: model(pose)"
        )

"""Apply a combination to all groups of a batch: by its `forward_groups`, or to one group after the other."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from gradhooks.combined import Combined, join_groups, result_of
from gradhooks.errors import CombinationError
from gradhooks.group_index import GroupIndex


def name_of(combination: Any) -> str:
    """Return the name of a combination for messages."""
    if combination is None:
        return "none"
    name: str = getattr(combination, "__name__", type(combination).__name__)
    return name


def accepts_empty_groups(combination: Any) -> bool:
    """Return whether a group may have no poses."""
    return combination is None or bool(getattr(combination, "accepts_empty_groups", False))


def combine_groups(
    combination: Callable[..., Tensor | Combined],
    predictions: Tensor,
    groups: GroupIndex,
    arguments: Mapping[str, Any],
    names: Collection[str],
) -> Tensor | Combined:
    """Combine all groups of a batch, by `forward_groups` where the combination has one.

    Args:
        combination: A `Combination` or any callable.
        predictions: Shape `(M, *prediction)`.
        groups: The group of each pose.
        arguments: Keyword arguments of the user's call.
        names: Which arguments have a row per pose.

    Returns:
        Shape `(B, *prediction)`.

    Raises:
        CombinationError: The result does not have one row per group.
    """
    forward_groups = own_forward_groups(combination)
    if forward_groups is None:
        return loop_over_groups(combination, predictions, groups, arguments, names)
    combined = forward_groups(predictions, groups.to(predictions.device), groups.count, **arguments)
    result = result_of(combined)
    if not isinstance(result, Tensor) or result.dim() == 0 or result.shape[0] != groups.count:
        found = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"{result!r}"
        raise CombinationError(
            f"{name_of(combination)}.forward_groups returned {found} for {groups.count} groups; it must return one row "
            f"for each, shape ({groups.count}, *prediction)"
        )
    return combined


def own_forward_groups(combination: Any) -> Callable[..., Tensor | Combined] | None:
    """Return the method `forward_groups` of a combination if it belongs to its `forward`, or None.

    It does not if a subclass, or the object itself, has replaced `forward` and inherits `forward_groups`. A module with
    hooks has none either, because hooks run in a call of the module only.
    """
    method: Callable[..., Tensor | Combined] | None = getattr(combination, "forward_groups", None)
    if method is None or "forward" in getattr(combination, "__dict__", {}) or _has_hooks(combination):
        return None
    for base in type(combination).__mro__:
        if "forward_groups" in vars(base):
            return method
        if "forward" in vars(base) or "__call__" in vars(base):
            return None
    return method


def loop_over_groups(
    combination: Callable[..., Tensor | Combined],
    predictions: Tensor,
    groups: GroupIndex,
    arguments: Mapping[str, Any],
    names: Collection[str],
) -> Tensor | Combined:
    """Combine one group after the other.

    Args:
        combination: A `Combination` or any callable.
        predictions: Shape `(M, *prediction)`.
        groups: The group of each pose.
        arguments: Keyword arguments of the user's call.
        names: Which arguments have a row per pose.

    Returns:
        Shape `(B, *prediction)`.

    Raises:
        CombinationError: The result for a group is not a tensor, or differs in shape from that for the first one.
    """
    columns = {name: groups.split(arguments[name]) for name in names}
    parts: list[Tensor | Combined] = []
    for number, rows in enumerate(groups.split(predictions)):
        own = {name: column[number] for name, column in columns.items()}
        parts.append(combination(rows, **{**arguments, **own}))
        result, first = result_of(parts[-1]), result_of(parts[0])
        if not isinstance(result, Tensor) or result.shape != first.shape:
            found = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"{result!r}"
            raise CombinationError(
                f"{name_of(combination)} returned {found} for group {number} of {len(rows)} poses; it must return a "
                f"tensor of one shape for every group{f', as {tuple(first.shape)} for group 0' if number else ''}"
            )
    return join_groups(parts, groups)


def _has_hooks(combination: Any) -> bool:
    if not isinstance(combination, nn.Module):
        return False
    return bool(
        combination._forward_hooks
        or combination._forward_pre_hooks
        or combination._backward_hooks
        or combination._backward_pre_hooks
    )

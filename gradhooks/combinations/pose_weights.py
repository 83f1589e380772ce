"""The argument `weights=` of the built-in combinations: statistical weights of the poses, given by the user."""

import torch
from torch import Tensor

from gradhooks.errors import CombinationError
from gradhooks.group_reductions import group_max
from gradhooks.numerics import per_row, to_float64


def log_weights(weights: Tensor | None, predictions: Tensor) -> Tensor:
    """Return the logarithms of the weights in float64, in a shape that broadcasts over the predictions.

    Args:
        weights: Shape `(N,)`, not negative; may be a boolean mask. None stands for weights of 1.
        predictions: Shape `(N, *prediction)`: a group, or some of its poses, or poses of several groups.

    Raises:
        CombinationError: The weights have another shape, or, on the CPU, one is negative or NaN.
    """
    if weights is None:
        return to_float64(torch.zeros((), device=predictions.device))
    numbers = _as_numbers(weights, predictions)
    # On a device this would wait for it with every chunk; there `log_weights_of_groups` finds what is invalid.
    if numbers.device.type == "cpu" and _is_invalid(numbers).any():
        raise _invalid_error(numbers)
    return per_row(numbers.log(), predictions)


def log_weights_of_groups(
    weights: Tensor | None, predictions: Tensor, groups: Tensor | None = None, count: int = 1
) -> Tensor:
    """Return what `log_weights` returns, and refuse groups in which all weights are 0.

    Weights are checked, for which it waits for their device once.

    Args:
        weights: Shape `(M,)`, or None.
        predictions: All predictions of the groups, shape `(M, *prediction)`.
        groups: The group of each pose, shape `(M,)`. None stands for one group.
        count: The number of groups.

    Raises:
        CombinationError: As for `log_weights`, or all weights of a group are 0.
    """
    if weights is None:
        return log_weights(None, predictions)
    numbers = _as_numbers(weights, predictions)
    index = groups if groups is not None else torch.zeros(len(numbers), dtype=torch.int64, device=numbers.device)
    # 1 for a group with a weight that is not 0, else 0; an empty group has the maximum -inf
    is_lost = group_max((numbers.detach() != 0).to(numbers.dtype), index, count) == 0
    is_invalid = _is_invalid(numbers)
    if torch.cat([is_invalid, is_lost]).any():
        raise _invalid_error(numbers) if is_invalid.any() else _lost_error(is_lost, index, several=groups is not None)
    return per_row(numbers.log(), predictions)


def _as_numbers(weights: Tensor, predictions: Tensor) -> Tensor:
    if weights.shape != predictions.shape[:1]:
        raise CombinationError(
            f"weights must have shape ({len(predictions)},), one weight for each pose, got shape {tuple(weights.shape)}"
        )
    return to_float64(weights.to(predictions.device, non_blocking=True))


def _is_invalid(numbers: Tensor) -> Tensor:
    return ~(numbers >= 0)


def _invalid_error(numbers: Tensor) -> CombinationError:
    number = numbers[_is_invalid(numbers)][0].item()
    return CombinationError(f"weights must not be negative or NaN, got {number:g}")


def _lost_error(is_lost: Tensor, index: Tensor, *, several: bool) -> CombinationError:
    number = int(is_lost.nonzero()[0])
    where, size = f"group {number}: " if several else "", int((index == number).sum())
    return CombinationError(
        f"{where}all {size} weights are 0, so no pose is left to combine; give at least one a positive weight"
    )

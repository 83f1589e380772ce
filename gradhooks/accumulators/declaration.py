"""A combination's declaration for some poses, checked and brought to the host."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.context import Group
from gradhooks.errors import CombinationError


class Declaration(NamedTuple):
    """`StreamWeights` as numbers: torch operators on single numbers would cost more than a small model.

    Attributes:
        log_weights: One for each of `n` poses.
        features: `K` for each.
        uniform: Whether all poses weigh the same, whatever they predict.
    """

    log_weights: list[float]
    features: list[list[float]]
    uniform: bool = False


def declared(group: Group, predictions: Tensor, start: int = 0) -> Declaration | None:
    """What the combination declares for the predictions of the poses from `start` on, None where it does not.

    Raises:
        CombinationError: The declaration has other shapes than its contract.
    """
    if start > 0:
        return _declared(group, predictions, start)
    count = len(predictions)
    if count not in group.declarations:  # every accumulator asks for the first poses again
        group.declarations[count] = _declared(group, predictions, start)
    known: Declaration | None = group.declarations[count]
    return known


def _declared(group: Group, predictions: Tensor, start: int) -> Declaration | None:
    count = len(predictions)
    if predictions.numel() != count:
        return None
    claim = group.combination.declare(predictions.detach().flatten(), group.share.first + start)
    if claim is None:
        return None
    log_weights, features = claim
    if log_weights is None and features is None:
        return uniform(count)
    log_weights = torch.zeros(count) if log_weights is None else log_weights
    features = torch.zeros(count, 0) if features is None else features
    features = features.unsqueeze(1) if features.dim() == 1 else features
    if log_weights.shape != (count,) or features.shape != (count, features[:1].numel()):
        raise CombinationError(
            f"combination {group.combination.name}: stream_weights of {count} predictions must give log_weights of "
            f"shape ({count},) and features of shape ({count},) or ({count}, K), got {tuple(log_weights.shape)} and "
            f"{tuple(features.shape)}"
        )
    if features.numel() == 0:
        return Declaration(log_weights.tolist(), [[]] * count)
    rows = torch.cat([log_weights.unsqueeze(1), features], 1).tolist()  # a device is asked once
    return Declaration([row[0] for row in rows], [row[1:] for row in rows])


def without(declaration: Declaration, excluded: list[bool]) -> Declaration:
    """The declaration with no weight for the poses that are marked."""
    claims = zip(*declaration[:2], excluded, strict=True)
    kept = [(-math.inf, [0.0] * len(features)) if out else (weight, features) for weight, features, out in claims]
    return Declaration([weight for weight, _ in kept], [features for _, features in kept])


def uniform(count: int) -> Declaration:
    """The declaration that weighs `count` poses alike."""
    return Declaration([0.0] * count, [[]] * count, uniform=True)

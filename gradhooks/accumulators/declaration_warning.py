"""The warning about declarations that do not explain the coefficients: once for each type of combination."""

import warnings
import weakref

from gradhooks.combination import BoundCombination
from gradhooks.errors import GradhooksWarning

_warned: "weakref.WeakSet[type]" = weakref.WeakSet()
"""The types of combinations whose warning was given in this process. Python's own record is by text, which counts."""


def warn_unexplained(combination: BoundCombination, unexplained: int, count: int) -> None:
    """Warn that the declaration does not explain the coefficients of `unexplained` of `count` poses."""
    kind = type(combination.combination)
    if not unexplained or kind in _warned:
        return
    _warned.add(kind)
    warnings.warn(
        f"combination {combination.name}: its stream_weights do not explain the coefficients of {unexplained} of "
        f"{count} poses, which were recomputed; the gradient is correct, and slower. Later batches do not warn again",
        GradhooksWarning,
        stacklevel=2,
    )


def forget_warnings() -> None:
    """Warn again for every type of combination."""
    _warned.clear()

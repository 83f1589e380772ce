"""Compare the predictions of a second run with those of the first.

What may differ is half of the digits of the spread of the predictions, and a quarter of the digits of their size:
kernels that add in varying order lose a few digits, a model that draws other random numbers loses all. A batch of one
pose, or of equal ones, has no spread.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradhooks.engine.context import ForwardContext
from gradhooks.errors import ReplayError
from gradhooks.row_arguments import rows_of

BLOCK_BYTES = 2**16
"""How many predictions of the second run are kept until they are compared."""

Rows = slice | Sequence[int]


class DriftCheck:
    """Compares the predictions of a second run with those of the first, block by block. Waits for the device once.

    Args:
        context: The intercepted poses.
        predictions: Shape `(N, *prediction)`: the predictions of all poses in the first run.
        packed: Whether the poses run in other chunks than the first time.
    """

    def __init__(self, context: ForwardContext, predictions: Tensor, *, packed: bool) -> None:
        self._context = context
        self._predictions = predictions
        self._allowed, size = allowed_differences(predictions)
        if packed:
            self._allowed = coarsest_eps(context, predictions.dtype) ** 0.75 * size
        self._capacity = min(len(predictions), BLOCK_BYTES * len(predictions) // max(1, predictions.nbytes))
        self._second: Tensor | None = None
        self._waiting: list[Rows] = []
        self._filled = 0
        self._rows: list[Rows] = []
        self._worst: list[Tensor] = []

    def add(self, rows: Rows, second: Tensor) -> None:
        """Take the predictions of some poses in the second run, shape `(n, *prediction)`."""
        if self._filled + len(second) > self._capacity:
            self._compare_waiting()
        if len(second) > self._capacity // 2:
            self._compare([rows], second)
            return
        if self._second is None:  # one block for all: small tensors between large ones would fragment the memory
            self._second = second.new_empty((self._capacity, *second.shape[1:]))
        self._second[self._filled : self._filled + len(second)] = second
        self._filled += len(second)
        self._waiting.append(rows)

    def refuse(self) -> None:
        """Raise an error if a prediction differs.

        Raises:
            ReplayError: A prediction differs by more than rounding explains.
        """
        self._compare_waiting()
        if self._worst:
            _refuse_drifted(self._context, self._rows, torch.cat(self._worst))

    def _compare_waiting(self) -> None:
        waiting, filled, self._waiting, self._filled = self._waiting, self._filled, [], 0
        if waiting and self._second is not None:
            self._compare(waiting, self._second[:filled])

    def _compare(self, rows: list[Rows], second: Tensor) -> None:
        """Keep how far each pose differs, 0 where rounding explains it."""
        self._worst.append(_worst_differences(self._predictions, rows, second, self._allowed))
        self._rows += rows


def allowed_differences(predictions: Tensor) -> tuple[Tensor, Tensor]:
    """Return what rounding explains, shape `(*prediction)`, if poses run in the same chunks; and the size, shape `()`.

    Args:
        predictions: Shape `(N, *prediction)`: those of the first run.
    """
    eps = torch.finfo(predictions.dtype).eps
    smallest, largest = _finite_range(predictions)
    size = torch.maximum(largest, -smallest).max().clamp(min=0)
    return eps**0.75 * size + eps**0.5 * (largest - smallest).clamp(min=0), size


def coarsest_eps(context: ForwardContext, dtype: torch.dtype) -> float:
    """Return the rounding error of predictions whose poses run in other chunks than before.

    Other neighbours in a chunk change the last digits only, unless a prediction really depends on them.
    """
    return max(torch.finfo(each).eps for each in (dtype, *context.batch.autocast.dtypes))


def refuse_worst(
    context: ForwardContext, rows: Sequence[Rows], first: Tensor, second: Tensor, allowed: float | Tensor
) -> None:
    """Raise an error if a row of a second run differs from the first by more than is allowed.

    Args:
        context: The intercepted poses.
        rows: Which rows of `first` those of `second` are.
        first: Shape `(N, K)`: what is known of the first run.
        second: Shape `(n, K)`: the same of the second run.
        allowed: The difference that rounding explains.

    Raises:
        ReplayError: A row differs.
    """
    _refuse_drifted(context, rows, _worst_differences(first, rows, second, allowed))


def _worst_differences(first: Tensor, rows: Sequence[Rows], second: Tensor, allowed: float | Tensor) -> Tensor:
    """Return how far each row differs, 0 where rounding explains it."""
    parts = [rows_of(first, each if isinstance(each, slice) else torch.tensor(each)) for each in rows]
    drifts = _differences(parts[0] if len(parts) == 1 else torch.cat(parts), second)
    return torch.where(drifts > allowed, drifts, 0).reshape(len(second), -1).amax(1)


def _refuse_drifted(context: ForwardContext, rows: Sequence[Rows], worst: Tensor) -> None:
    differences = worst.tolist()
    drifted = next((row for row, difference in enumerate(differences) if difference > 0), None)
    if drifted is None:
        return
    index = list(chain.from_iterable(_numbers(each) for each in rows))[drifted]
    raise ReplayError(
        f"pose {index} of {len(context.poses)}: its second run differs from its first by "
        f"{differences[drifted]:.3g}; {_cause(context.poses, index)}"
    )


def refuse_drift(
    context: ForwardContext, indices: Tensor, second: Tensor, predictions: Tensor, *, packed: bool
) -> None:
    """Raise an error if a second run gave other predictions than the first. Waits for the device once.

    Args:
        context: The intercepted poses.
        indices: Shape `(n,)`: which poses ran again.
        second: Shape `(n, *prediction)`: their predictions in the second run.
        predictions: Shape `(N, *prediction)`: the predictions of all poses in the first run.
        packed: Whether the poses ran in other chunks than the first time.

    Raises:
        ReplayError: A prediction differs by more than rounding explains.
    """
    check = DriftCheck(context, predictions, packed=packed)
    check.add(indices.tolist(), second)
    check.refuse()


def _numbers(rows: Rows) -> Sequence[int]:
    return range(rows.start, rows.stop) if isinstance(rows, slice) else rows


def _cause(poses: Any, index: int) -> str:
    changed = poses.differing_tensors(index) if getattr(poses, "loaded", False) else []
    if changed:
        return (
            f"the pose is another one each time it is read: {', '.join(changed)} differ. poses[i] must be "
            "deterministic (draw augmentations from a generator that is seeded by i), or pass list(poses), which keeps "
            "what was read"
        )
    workers = ", a pose that the workers of a DataLoader read differently" if getattr(poses, "loaded", False) else ""
    return (
        "the model depends on something that is not restored (a random generator that is no attribute of a module, "
        f"state in another object, a pose changed in place{workers}). Name its generators with generators=[...], or "
        "use accumulator='store', which runs every pose once"
    )


def spread(predictions: Tensor) -> Tensor:
    """Return the range of each component over the poses, shape `(*prediction)`, of the finite ones; 0 without any.

    The range, not the size, is the scale on which poses differ: total energies of -3000 may vary by 1.
    """
    smallest, largest = _finite_range(predictions)
    return (largest - smallest).clamp(min=0)


def _finite_range(predictions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest finite value of each component; infinity and minus infinity without any.

    Block by block, since there may be many predictions, and each operation makes a copy.
    """
    size = max(1, BLOCK_BYTES * len(predictions) // max(1, predictions.nbytes))
    smallest, largest = [], []
    for start in range(0, len(predictions), size):
        block = predictions[start : start + size]
        finite = block.isfinite()
        smallest.append(torch.where(finite, block, torch.inf).amin(0))
        largest.append(torch.where(finite, block, -torch.inf).amax(0))
    return torch.stack(smallest).amin(0), torch.stack(largest).amax(0)


def _differences(first: Tensor, second: Tensor) -> Tensor:
    """Return how far predictions differ: 0 where the first is not finite, infinity where only the second is not."""
    differences = torch.where(second.isfinite(), (second - first).abs(), torch.inf)
    return torch.where(first.isfinite(), differences, 0)

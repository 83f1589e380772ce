"""What a group predicts, and what is known of how it was made."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node
from torch.utils.weak import WeakTensorKeyDictionary

from gradhooks.combination import BoundCombination
from gradhooks.engine.nested import map_tensors

# How a prediction was combined, by its tensors. Trainers rebuild named tuples of their fields alone (Accelerate to cast
# what is narrow, Lightning to move predictions), mostly around tensors that they left as they were.
_made_by: Any = WeakTensorKeyDictionary()


class _Predictions(tuple[Tensor, Tensor]):  # noqa: SLOT001 - a tuple has no room in slots
    """A named tuple to everybody but PyTorch, which makes those anew of their tensors alone.

    Others look for `_fields` and `_asdict`; PyTorch looks for `_make` too. Older releases of it do not, but look for no
    base but `tuple`: so this stands between `tuple` and the class that users get.
    """

    _fields = __match_args__ = ("combined", "per_pose")

    @property
    def combined(self) -> Tensor:
        return self[0]

    @property
    def per_pose(self) -> Tensor:
        return self[1]

    def _asdict(self) -> dict[str, Tensor]:
        return {"combined": self.combined, "per_pose": self.per_pose}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(combined={self.combined!r}, per_pose={self.per_pose!r})"


class MultiPosePrediction(_Predictions):
    """What a group predicts; unpacks into `combined, per_pose`.

    Attributes:
        combined: The combination's result, by convention of the shape `(*prediction)` that one pose has.
        per_pose: Shape `(N, *prediction)`, in the order of the poses. Losses may use it, alone or beside `combined`.
    """

    _combination: BoundCombination | None
    _chosen: Tensor | None

    def __new__(  # noqa: PYI034 - typing.Self needs Python 3.11
        cls,
        combined: Tensor,
        per_pose: Tensor,
        combination: BoundCombination | None = None,
        chosen: Tensor | None = None,
    ) -> "MultiPosePrediction":
        self = super().__new__(cls, (combined, per_pose))
        tensors = [tensor for tensor in (per_pose, combined) if isinstance(tensor, Tensor)]
        if combination is None:
            known = (_made_by[tensor] for tensor in tensors if tensor in _made_by)
            combination, chosen = next(known, (None, None))
        else:
            _made_by.update((tensor, (combination, chosen)) for tensor in tensors)
        self._combination, self._chosen = combination, chosen
        return self

    def __getnewargs__(self) -> tuple[Tensor, Tensor]:
        return self.combined, self.per_pose

    def _replace(self, **tensors: Tensor) -> "MultiPosePrediction":
        return MultiPosePrediction(**{**self._asdict(), **tensors}, combination=self._combination, chosen=self._chosen)

    def coefficients(self) -> Tensor:
        """`d combined / d pose prediction`, detached, shape `(N, *prediction)`: which poses made the prediction.

        Combines the predictions once more; no pose is run. A result of several numbers is summed first.

        Raises:
            AttributeError: This is a copy that has lost its combination (after pickling, or in another process).
        """
        if self._combination is None:
            raise AttributeError(
                "this prediction has lost its combination; read coefficients() where the group was run"
            )
        with torch.inference_mode(False), torch.enable_grad():
            predictions = _ordinary(self.per_pose).detach().requires_grad_()
            combination = replace(self._combination, arguments=map_tensors(_ordinary, self._combination.arguments))
            combined = combination(predictions, None if self._chosen is None else _ordinary(self._chosen))
            (weights,) = torch.autograd.grad(combined.sum(), predictions)
        return weights


def _ordinary(tensor: Tensor) -> Tensor:
    """What was made under `inference_mode`, as a tensor that autograd may save."""
    return tensor.clone() if tensor.is_inference() else tensor


def _flatten(prediction: MultiPosePrediction) -> tuple[list[Any], Any]:
    return list(prediction), (prediction._combination, prediction._chosen)


def _unflatten(tensors: Iterable[Any], context: Any) -> MultiPosePrediction:
    return MultiPosePrediction(*tensors, *context)


# DistributedDataParallel takes outputs apart and puts them together again.
register_pytree_node(MultiPosePrediction, _flatten, _unflatten)

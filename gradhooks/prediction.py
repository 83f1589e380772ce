"""MultiPosePrediction: what a call of `MultiPose` returns."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node
from torch.utils.weak import WeakTensorKeyDictionary

from gradhooks.combination import BoundCombination
from gradhooks.engine.model_output import finite_rows
from gradhooks.engine.nested import map_tensors
from gradhooks.errors import PredictionError
from gradhooks.options import Nonfinite

# The combination behind a prediction, by its tensors. Trainers rebuild named tuples from their fields (Accelerate to
# cast them, Lightning to move them), mostly with the same tensors.
_combination_of: Any = WeakTensorKeyDictionary()


class _Fields(tuple[Tensor, Tensor]):  # noqa: SLOT001 - a tuple subclass cannot have non-empty slots
    """Looks like a namedtuple, but torch's pytree must not rebuild it from its fields alone.

    Other libraries look for `_fields` and `_asdict`; pytree looks for `_make` too, which this class lacks. Older
    releases of torch take any class whose only base is `tuple` for a namedtuple, so this class stands between `tuple`
    and the class that users get.
    """

    _fields = __match_args__ = ("combined", "per_pose")

    @property
    def combined(self) -> Tensor:
        """The result of the combination."""
        return self[0]

    @property
    def per_pose(self) -> Tensor:
        """The predictions of the poses."""
        return self[1]

    def _asdict(self) -> dict[str, Tensor]:
        return {"combined": self.combined, "per_pose": self.per_pose}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(combined={self.combined!r}, per_pose={self.per_pose!r})"


class MultiPosePrediction(_Fields):
    """The prediction of a group; unpacks into `combined, per_pose`.

    Attributes:
        combined: The result of the combination, by convention of shape `(*prediction)`, as for one pose.
        per_pose: Shape `(N, *prediction)`, in the order of the poses. A loss may use it together with `combined` or
            alone.
    """

    _combination: BoundCombination | None
    _selected: Tensor | None

    def __new__(  # noqa: PYI034 - typing.Self needs Python 3.11
        cls,
        combined: Tensor,
        per_pose: Tensor,
        combination: BoundCombination | None = None,
        selected: Tensor | None = None,
    ) -> "MultiPosePrediction":
        self = super().__new__(cls, (combined, per_pose))
        tensors = [tensor for tensor in (per_pose, combined) if isinstance(tensor, Tensor)]
        if combination is None:
            known = (_combination_of[tensor] for tensor in tensors if tensor in _combination_of)
            combination, selected = next(known, (None, None))
        else:
            _combination_of.update((tensor, (combination, selected)) for tensor in tensors)
        self._combination, self._selected = combination, selected
        return self

    def __getnewargs__(self) -> tuple[Tensor, Tensor]:
        return self.combined, self.per_pose

    def _replace(self, **tensors: Tensor) -> "MultiPosePrediction":
        fields = {**self._asdict(), **tensors}
        return MultiPosePrediction(**fields, combination=self._combination, selected=self._selected)

    def coefficients(self) -> Tensor:
        """Return `d combined / d per_pose`, detached, shape `(N, *prediction)`: which poses made the prediction.

        The predictions are combined again; no pose is run. A combined prediction of several numbers is summed first.

        Raises:
            AttributeError: This is a copy that has lost its combination, after pickling or in another process.
        """
        if self._combination is None:
            raise AttributeError(
                "this prediction has lost its combination (by pickling, or in another process); call coefficients() "
                "where the group was run"
            )
        with torch.inference_mode(False), torch.enable_grad():
            predictions = _outside_inference(self.per_pose).detach().requires_grad_()
            arguments = map_tensors(_outside_inference, self._combination.arguments)
            selected = None if self._selected is None else _outside_inference(self._selected)
            combined = replace(self._combination, arguments=arguments)(predictions, selected)
            (coefficients,) = torch.autograd.grad(combined.sum(), predictions)
        return coefficients


def combine(
    combination: BoundCombination, predictions: Tensor, per_pose: Tensor, nonfinite: Nonfinite
) -> MultiPosePrediction:
    """Combine the predictions of a group.

    Args:
        combination: The combination with the arguments of the call.
        predictions: Shape `(N, *prediction)`, for the combination.
        per_pose: Shape `(N, *prediction)`, equal to `predictions`, for the user.
        nonfinite: The option `nonfinite`.

    Raises:
        PredictionError: Poses without a finite prediction are dropped, and no other pose is left.
    """
    finite = None
    if nonfinite == "drop":
        finite = finite_rows(predictions)
        if not finite.any():
            raise PredictionError(f"none of the {len(finite)} predictions of the group is finite, so none is left")
    return MultiPosePrediction(combination(predictions, finite), per_pose, combination, finite)


def _outside_inference(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may save, although `tensor` may have been made under `inference_mode`."""
    return tensor.clone() if tensor.is_inference() else tensor


def _flatten(prediction: MultiPosePrediction) -> tuple[list[Any], Any]:
    return list(prediction), (prediction._combination, prediction._selected)


def _unflatten(tensors: Iterable[Any], context: Any) -> MultiPosePrediction:
    return MultiPosePrediction(*tensors, *context)


# DistributedDataParallel flattens and rebuilds outputs.
register_pytree_node(MultiPosePrediction, _flatten, _unflatten)

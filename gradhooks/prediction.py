"""MultiPosePrediction: what a call of `MultiPose` returns."""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from gradhooks.combination import BoundCombination
from gradhooks.combined import Combined, Output
from gradhooks.engine.model_output import finite_rows
from gradhooks.engine.nested import map_tensors
from gradhooks.errors import CombinationError, PredictionError
from gradhooks.options import Nonfinite
from gradhooks.unused_parameter_search import visible_to_search

# By the id of a tensor of a prediction: its combination, what was selected, its side, a weak reference to its outputs,
# whose graphs may hold the tensor; and the weak reference that removes the entry. Trainers rebuild named tuples from
# their fields, mostly with the same tensors. `WeakTensorKeyDictionary` takes 20 us longer.
_origins: dict[int, tuple[Any, object]] = {}


def _remember(tensor: Tensor, origin: Any) -> None:
    _origins[id(tensor)] = (origin, weakref.ref(tensor, partial(_origins.pop, id(tensor))))


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
    """The prediction of a batch; unpacks into `combined, per_pose`.

    Attributes:
        combined: The result of the combination, by convention of shape `(B, *prediction)` with groups and
            `(*prediction)` without; `per_pose` itself without a combination.
        per_pose: Shape `(M, *prediction)`, in the order of the poses. A loss may use it together with `combined` or
            alone.
        side: What `call=` returned beside the predictions, shape `(M, *side)`, with gradient; None if it did not.
    """

    _combination: BoundCombination | None
    _selected: Tensor | None
    _outputs: Combined | None
    side: Tensor | None

    def __new__(  # noqa: PLR0917, PYI034 - optional parts; typing.Self needs Python 3.11
        cls,
        combined: Tensor,
        per_pose: Tensor,
        combination: BoundCombination | None = None,
        selected: Tensor | None = None,
        outputs: Combined | None = None,
        side: Tensor | None = None,
    ) -> "MultiPosePrediction":
        self = super().__new__(cls, (combined, per_pose))
        tensors = [tensor for tensor in (per_pose, combined) if isinstance(tensor, Tensor)]
        if combination is None:
            known = (_origins[id(tensor)][0] for tensor in tensors if id(tensor) in _origins)
            combination, selected, known_side, reference = next(known, (None, None, None, None))
            side = known_side if side is None else side
            outputs = None if reference is None else reference()
        else:
            reference = None if outputs is None else weakref.ref(outputs)
            for tensor in tensors:
                _remember(tensor, (combination, selected, side, reference))
        self._combination, self._selected, self.side, self._outputs = combination, selected, side, outputs
        return self

    def __getnewargs__(self) -> tuple[Tensor, Tensor]:
        return self.combined, self.per_pose

    def _replace(self, **tensors: Tensor) -> "MultiPosePrediction":
        fields: dict[str, Any] = {**self._asdict(), **tensors, **self._details()}
        return MultiPosePrediction(**fields)

    def _details(self) -> dict[str, Any]:
        """Return what the prediction holds beside its fields."""
        return {
            "combination": self._combination,
            "selected": self._selected,
            "side": self.side,
            "outputs": self._outputs,
        }

    @property
    def groups(self) -> Tensor | None:
        """The group of each pose, shape `(M,)`, int64, on the device of `per_pose`; None without groups.

        Raises:
            AttributeError: As for `coefficients`.
        """
        index = self._bound("groups").groups
        return None if index is None else index.to(self.per_pose.device)

    @property
    def outputs(self) -> Combined:
        """What the combination computed beside its result, with graph.

        Raises:
            AttributeError: As for `coefficients`; or the combination returned its result alone.
        """
        bound = self._bound("outputs")
        if self._outputs is None:
            raise AttributeError(
                f"the combination {bound.name} returned its result alone; let it return a gradhooks.Combined, or let "
                "the module of a Pooling return more, as in Pooling(head, return_att=True)"
            )
        return self._outputs

    @property
    def attention(self) -> Tensor:
        """The attention of the combination to each pose, shape `(M, ...)`, with graph: the first of `outputs.per_pose`.

        What the numbers mean is up to the combination: weights, or scores before a softmax.

        Raises:
            AttributeError: As for `outputs`; or none of the outputs has a row per pose.
        """
        per_pose: tuple[Output, ...] = self.outputs.per_pose
        if not per_pose or isinstance(per_pose[0], tuple):
            raise AttributeError(
                f"the combination {self._bound('attention').name} returned no tensor with a row per pose; what it "
                "returned is in outputs"
            )
        return per_pose[0]

    def split(self) -> tuple[Tensor, ...]:
        """Return the predictions of each group, in the order of its poses, with graph: B tensors, one without groups.

        Raises:
            AttributeError: As for `coefficients`.
        """
        index = self._bound("split()").groups
        return (self.per_pose,) if index is None else index.split(self.per_pose)

    def coefficients(self) -> Tensor:
        """Return `d combined / d per_pose`, detached, shape `(M, *prediction)`: which poses made the prediction.

        The predictions are combined again; no pose is run. A combined prediction of several numbers is summed first.
        With groups, it is the coefficient in the combined prediction of the pose's own group.

        Raises:
            AttributeError: This is a copy that has lost its combination, after pickling or in another process.
        """
        bound = self._bound("coefficients()")
        with torch.inference_mode(False), torch.enable_grad():
            predictions = _outside_inference(self.per_pose).detach().requires_grad_()
            arguments = map_tensors(_outside_inference, bound.arguments)
            selected = None if self._selected is None else _outside_inference(self._selected)
            combined = replace(bound, arguments=arguments)(predictions, selected)
            (coefficients,) = torch.autograd.grad(combined.sum(), predictions)
        return coefficients

    def _bound(self, name: str) -> BoundCombination:
        if self._combination is None:
            raise AttributeError(
                f"this prediction has lost its combination (by pickling, or in another process); use {name} where the "
                "batch was run"
            )
        return self._combination


def combine(
    combination: BoundCombination,
    predictions: Tensor,
    per_pose: Tensor,
    nonfinite: Nonfinite,
    *,
    side: Tensor | None = None,
) -> MultiPosePrediction:
    """Combine the predictions of a batch.

    Args:
        combination: The combination with the groups and the arguments of the call.
        predictions: Shape `(M, *prediction)`, for the combination.
        per_pose: Shape `(M, *prediction)`, equal to `predictions`, for the user; also the result if there is no
            combination.
        nonfinite: The option `nonfinite`.
        side: Shape `(M, *side)`, or None.

    Raises:
        PredictionError: Poses without a finite prediction are dropped, and no other pose of a group is left.
        CombinationError: Poses are to be dropped, and there is no combination.
    """
    if combination.combination is None:
        if nonfinite == "drop":
            raise CombinationError(
                "nonfinite='drop' leaves poses out of the combination, and combination=None combines nothing; use "
                "'propagate' or 'raise'"
            )
        return MultiPosePrediction(per_pose, per_pose, combination, side=side)
    finite = None
    if nonfinite == "drop":
        finite = finite_rows(predictions.detach()).cpu()  # the one time that the host waits for it
        if combination.groups is None and not finite.any():
            raise PredictionError(f"none of the {len(finite)} predictions of the group is finite, so none is left")
    combined = combination.combine(predictions, finite)
    if not isinstance(combined, Combined):
        return MultiPosePrediction(combined, per_pose, combination, finite, side=side)
    result = visible_to_search(combined.result, (*combined.per_pose, *combined.per_group))
    return MultiPosePrediction(result, per_pose, combination, finite, combined, side)


def _outside_inference(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may save, although `tensor` may have been made under `inference_mode`."""
    return tensor.clone() if tensor.is_inference() else tensor


def _flatten(prediction: MultiPosePrediction) -> tuple[list[Any], Any]:
    details = prediction._details()
    side = details.pop("side")
    return [*prediction, *([] if side is None else [side])], details


def _unflatten(tensors: Iterable[Any], details: Any) -> MultiPosePrediction:
    combined, per_pose, *side = tensors
    return MultiPosePrediction(combined, per_pose, **details, side=side[0] if side else None)


# DistributedDataParallel flattens and rebuilds outputs.
register_pytree_node(MultiPosePrediction, _flatten, _unflatten)

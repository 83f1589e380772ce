"""Side outputs: what `call=` returns beside the prediction of a pose, for losses of its own.

The side of a pose goes through the engine as further numbers of its prediction, so that every accumulator delivers its
gradient; the combination does not see them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradhooks.engine.model_output import prediction_rows
from gradhooks.errors import PredictionError


class Part(NamedTuple):
    """Shape and dtype of the prediction, or of the side, of a pose."""

    shape: torch.Size
    dtype: torch.dtype


class Layout(NamedTuple):
    """What a row contains: the prediction of a pose, then its side."""

    prediction: Part
    side: Part

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions, shape `(n, *prediction)`, and sides, shape `(n, *side)`, of rows `(n, numbers)`."""
        count = self.prediction.shape.numel()
        return (
            rows[:, :count].reshape(len(rows), *self.prediction.shape),
            rows[:, count:].reshape(len(rows), *self.side.shape).to(self.side.dtype),
        )


def output_rows(
    output: Any, start: int, stop: int, batched: bool, *, may_have_side: bool
) -> tuple[Tensor, Layout | None]:
    """Return the model's output for the poses `start .. stop - 1` as rows, and what a row contains.

    Args:
        output: The model's output, or a tuple of prediction and side.
        start: The index of the first pose.
        stop: The index after the last pose.
        batched: Whether axis 0 of the output, and of the side, is the pose.
        may_have_side: Whether a tuple of two is taken for prediction and side.

    Returns:
        Shape `(stop - start, *prediction)` and None without a side; shape `(stop - start, numbers)` and the layout
        with one.

    Raises:
        PredictionError: Prediction or side are not floating-point tensors with one row per pose.
    """
    if not (may_have_side and type(output) is tuple and len(output) == 2):  # noqa: PLR2004 - prediction and side
        return prediction_rows(output, start, stop, batched), None
    prediction = prediction_rows(output[0], start, stop, batched)
    try:
        side = prediction_rows(output[1], start, stop, batched)
    except PredictionError as error:
        raise PredictionError(f"call= returned (prediction, side), and the side cannot be used: {error}") from error
    layout = Layout(Part(prediction.shape[1:], prediction.dtype), Part(side.shape[1:], side.dtype))
    # `cat` promotes to the wider dtype, in which both are exact.
    return torch.cat([_flat(prediction), _flat(side)], 1), layout


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1)


def check_layout(first: Layout | None, layout: Layout | None, start: int) -> None:
    """Check that a pose has a side of the same shape as the first pose.

    Raises:
        PredictionError: It has another one, or only one of them has a side.
    """
    if layout != first:
        raise PredictionError(
            f"pose {start}: call= returned {_describe(layout)}, and {_describe(first)} for pose 0; return the same for "
            "all poses"
        )


def _describe(layout: Layout | None) -> str:
    if layout is None:
        return "no side"
    return (
        f"a prediction of shape {tuple(layout.prediction.shape)} with a side of shape {tuple(layout.side.shape)} "
        f"({layout.side.dtype})"
    )

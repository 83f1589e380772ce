"""Check that the output of the model can be used as a prediction."""

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from gradhooks.errors import PredictionError


def prediction_rows(output: Any, start: int, stop: int, batched: bool) -> Tensor:
    """Return the model's output for the poses `start .. stop - 1` with shape `(stop - start, *prediction)`.

    Args:
        output: The model's output.
        start: The index of the first pose.
        stop: The index after the last pose.
        batched: Whether axis 0 of the output is the pose.

    Raises:
        PredictionError: The output is not a floating-point tensor, or does not have one row per pose.
    """
    if not isinstance(output, Tensor):
        raise PredictionError(
            f"{_poses(start, stop)}: the model returned {describe(output)}, not a tensor; "
            "choose the prediction with call=lambda model, pose: model(pose)[...]"
        )
    if not output.is_floating_point():
        raise PredictionError(
            f"{_poses(start, stop)}: the prediction is {output.dtype}; a gradient needs a floating-point dtype"
        )
    if not batched or (output.dim() == 0 and stop - start == 1):
        return output.unsqueeze(0)
    if output.dim() == 0 or output.shape[0] != stop - start:
        raise PredictionError(
            f"{_poses(start, stop)}: a batch of {stop - start} must give {stop - start} rows, the model returned shape "
            f"{tuple(output.shape)}; if it takes single poses without a batch axis, pass a list of poses "
            "(for a stacked tensor: poses.unbind()) and no collate"
        )
    return output


def _poses(start: int, stop: int) -> str:
    return f"pose {start}" if stop - start == 1 else f"poses {start} to {stop - 1}"


def finite_rows(rows: Tensor) -> Tensor:
    """Return which rows, shape `(n, *prediction)`, are finite: shape `(n,)`, bool."""
    return rows.isfinite().reshape(len(rows), -1).all(1)


def check_shape(first: Tensor, rows: Tensor, start: int) -> None:
    """Check that a chunk has predictions of the same shape as the first chunk.

    Args:
        first: The predictions of the first chunk.
        rows: The predictions to check.
        start: The index of their first pose.

    Raises:
        PredictionError: They differ in shape.
    """
    if rows.shape[1:] != first.shape[1:]:
        raise PredictionError(
            f"pose {start}: its prediction has shape {tuple(rows.shape[1:])}, that of pose 0 {tuple(first.shape[1:])}; "
            "all poses must give predictions of one shape"
        )


def refuse_detached(count: int) -> NoReturn:
    """Raise the error for `count` predictions none of which requires grad.

    Raises:
        PredictionError: Always.
    """
    raise PredictionError(
        f"no prediction of the {count} poses requires grad, though the model has parameters that do; does it detach "
        "its output, or compute it under torch.no_grad()? (To predict only, call it under no_grad.)"
    )


def refuse_nonfinite(predictions: Tensor) -> None:
    """Check that all predictions, shape `(M, *prediction)`, are finite. Waits for the device once.

    Raises:
        PredictionError: One is not.
    """
    if not predictions.isfinite().all():
        index = int(finite_rows(predictions).logical_not().nonzero()[0])
        raise PredictionError(
            f"pose {index}: its prediction is not finite ({predictions[index].flatten().tolist()}); "
            "nonfinite='drop' leaves such poses out, nonfinite='propagate' accepts them"
        )


def describe(value: Any) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(map(repr, value))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return f"one {type(value).__name__}"

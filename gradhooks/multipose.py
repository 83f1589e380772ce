"""MultiPose: the only place that sequences the steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks import checkpoints, registry
from gradhooks.accumulators.base import Accumulator, Ledger
from gradhooks.bridge import PosePredictions
from gradhooks.errors import PosesError, PredictionError
from gradhooks.group import Chunk, Group
from gradhooks.guard import run_guarded
from gradhooks.poses import Call, Collate, Poses, arrange, call_model, prediction_rows
from gradhooks.replay import Replay
from gradhooks.report import GroupReport
from gradhooks.shadow import ShadowParameters


class MultiPosePrediction(NamedTuple):
    """What a group predicts.

    Attributes:
        combined: The combination's result, by convention of the shape `(*prediction)` that the model gives for one pose.
        poses: Shape `(N, *prediction)`, in the order of the poses. Losses may use it, alone or beside `combined`.
    """

    combined: Tensor
    poses: Tensor


class MultiPose(nn.Module):
    """A model that takes groups: runs each pose through `model`, one at a time, and combines the predictions.

    Training is what it was: `loss.backward()` fills `.grad` with what the graph of all poses would have given, at about
    the memory of one.

    Args:
        model: Any module. It is neither copied nor changed.
        combination: A registered name, or an object: a `Combination`, or any callable from predictions of shape
            `(N, *prediction)` to a tensor.
        accumulator: A registered name or an `Accumulator`.
        call: `call(model, pose)` returns the prediction of a pose. The default passes a tuple as `model(*pose)`, a
            mapping as `model(**pose)`, anything else as `model(pose)`.
        chunk_size: How many poses go through the model at once with a graph.
        forward_chunk_size: How many go through at once where no graph is kept; None is `chunk_size`. Other batch sizes
            can mean other kernels, so agreement to the last bit is given up where the two differ.
        collate: Makes the model's input of a list of poses, so that it gives a row for each; needed to chunk a list.
        tolerance: A pose whose coefficient is this small relative to the largest gets no backward. None is the largest
            tolerance that leaves the result within half a rounding error; 0 skips only what is exactly zero.

    Attributes:
        report: The `GroupReport` of the last group.
    """

    def __init__(
        self,
        model: nn.Module,
        combination: str | Callable[[Tensor], Tensor] = "mean",
        *,
        accumulator: str | Accumulator = "auto",
        call: Call | None = None,
        chunk_size: int = 1,
        forward_chunk_size: int | None = None,
        collate: Collate | None = None,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an instance of torch.nn.Module, got {model!r}")
        self.model = model
        self.combination = registry.combinations.resolve(combination)
        self.accumulator: Accumulator = registry.accumulators.resolve(accumulator)
        self.call = call_model if call is None else call
        self.chunk_size = _at_least_one("chunk_size", chunk_size)
        self.forward_chunk_size = _at_least_one("forward_chunk_size", forward_chunk_size or chunk_size)
        self.collate = collate
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), relative to the largest coefficient, got {tolerance}")
        self.tolerance = tolerance
        self.report = GroupReport()
        checkpoints.use_keys_of_the_bare_model(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None:  # not constructed yet, as while unpickling
                raise
            return getattr(model, name)

    def forward(self, poses: Any) -> MultiPosePrediction:
        """Predict a group.

        Args:
            poses: An iterable of poses, or a tensor or mapping of tensors with the poses along axis 0, which the model
                gets in slices and answers with a row for each.

        Returns:
            `(combined, poses)`, both part of the user's graph.

        Raises:
            PosesError: The group is empty or no group.
            PredictionError: What the model returned is no floating-point tensor of one shape for all poses, or does not
                require grad although something could be trained.
            UnregisteredTensorError: It depends on a leaf that cannot be intercepted.
        """
        shadows = ShadowParameters(self.model)
        arranged = arrange(poses, self.collate, shadows.cut)
        if max(self.chunk_size, self.forward_chunk_size) > 1 and not arranged.batched:
            raise PosesError(
                "chunks of more than one pose need collate= to make a batch of a list, or poses stacked in a tensor"
            )
        self.report = GroupReport(poses=len(arranged), accumulator=self.accumulator.name)
        if not (torch.is_grad_enabled() and shadows.real):
            predictions = self._predict(arranged)
            return MultiPosePrediction(self.combination(_widened(predictions)), predictions)
        group = Group(
            model=self.model,
            call=self.call,
            poses=arranged,
            shadows=shadows,
            replay=Replay(self.model),
            declare=getattr(self.combination, "stream_weights", _declares_nothing),
            combination_name=type(self.combination).__name__,
            tolerance=self.tolerance,
            report=self.report,
        )
        ledger, predictions = self._run(group)
        through_combination, direct = PosePredictions.apply(group, ledger, predictions, *shadows.real)
        return MultiPosePrediction(self.combination(through_combination), direct)

    def _predict(self, poses: Poses) -> Tensor:
        """Nothing to train: nothing is hooked and nothing kept. Shape `(N, *prediction)`."""
        rows = []
        with torch.no_grad():
            for start in range(0, len(poses), self.forward_chunk_size):
                stop = min(start + self.forward_chunk_size, len(poses))
                output = self.call(self.model, poses.between(start, stop))
                rows.append(prediction_rows(output, start, stop, poses.batched))
                _check_shape(rows, start)
        return torch.cat(rows)

    def _run(self, group: Group) -> tuple[Ledger, Tensor]:
        """Send every pose through the model once, past the accumulator. Predictions have shape `(N, *prediction)`."""
        with group.shadows, group.replay.undone(unless_it_succeeds=True):
            count = len(group.poses)
            chunk = Chunk(0, min(self.chunk_size, count), group.replay.take(statistics=True))
            live = run_guarded(group, chunk)
            ledger = self.accumulator.open(group, live)
            differentiable = live.requires_grad
            rows = [live.detach()]
            ledger.add(chunk, live)
            while chunk.stop < count:
                del live  # the next pose needs the room of its graph
                with_graph = ledger.keeps_graph or not differentiable
                size = self.chunk_size if with_graph else self.forward_chunk_size
                chunk = Chunk(chunk.stop, min(chunk.stop + size, count), group.replay.take())
                run = group.run if with_graph else group.run_graphless
                live = run(chunk.start, chunk.stop)
                differentiable |= live.requires_grad
                rows.append(live.detach())
                _check_shape(rows, chunk.start)
                ledger.add(chunk, live)
        if not differentiable:
            raise PredictionError(
                f"no prediction of the {count} poses requires grad, though the model has parameters that do; does it "
                "detach its output, or compute it under torch.no_grad()? (To predict only, call it under no_grad.)"
            )
        return ledger, torch.cat(rows)


def _widened(predictions: Tensor) -> Tensor:
    return predictions.to(torch.promote_types(predictions.dtype, torch.float32))


def _declares_nothing(predictions: Tensor) -> None:
    del predictions


def _check_shape(rows: list[Tensor], start: int) -> None:
    first, last = rows[0].shape[1:], rows[-1].shape[1:]
    if first != last:
        raise PredictionError(
            f"pose {start}: its prediction has shape {tuple(last)}, that of pose 0 {tuple(first)}; all poses of a group "
            "must give predictions of one shape"
        )


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value

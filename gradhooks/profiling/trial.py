"""Trials: two training steps on a copy of the model, in plain PyTorch or with `MultiPose`, and all that they leave."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradhooks.options import Options
from gradhooks.prediction import MultiPosePrediction
from gradhooks.profiling.checked_batch import CheckedBatch
from gradhooks.profiling.gradient_error import norm_of
from gradhooks.profiling.independent_copy import COPIED_OPTIONS, IndependentCopy
from gradhooks.profiling.model_contents import plain_value
from gradhooks.profiling.outside_leaves import OutsideLeaves
from gradhooks.profiling.rounding import narrowest_dtype
from gradhooks.profiling.step_record import StepRecord, read_copy, read_gradients, set_parameters
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.profiling.training_steps import full_graph_prediction
from gradhooks.random_state import default_source, global_sources, user_sources
from gradhooks.wrapper import MultiPose

STEPS = 2
RELATIVE_STEP = 1e-3  # the size of the optimizer's update, relative to that of the parameters

Predict = Callable[[Any], MultiPosePrediction]


class NoGradientError(Exception):
    """Internal: the prediction of the full graph, or the loss, does not require grad."""


class Trials:
    """Runs trials from the same state, with the same poses and random numbers.

    Args:
        batch: What the user passed.

    Attributes:
        narrowest: The narrowest dtype in the graph of the loss. Set by the full graph.
        draws: Whether the model draws random numbers. Set by the full graph.
    """

    def __init__(self, batch: CheckedBatch) -> None:
        self.narrowest = torch.float64
        self.draws = False
        self._batch = batch
        self._learning_rate = 0.0
        self._outside = OutsideLeaves(batch.model)
        devices = {tensor.device for tensor in (*batch.model.parameters(), *batch.model.buffers())}
        devices = {device for device in devices if device.type != "meta"} | {torch.device("cpu")}
        generators = user_sources(batch.options.get("generators", ()))
        self._sources = [*map(default_source, devices), *global_sources(), *generators]
        self._states = [source.get() for source in self._sources]

    @property
    def eps(self) -> float:
        """The rounding error of the narrowest dtype."""
        return torch.finfo(self.narrowest).eps

    @property
    def trainable(self) -> list[str]:
        """The names of the parameters of the model that require grad."""
        return [name for name, leaf in self._batch.model.named_parameters() if leaf.requires_grad]

    def restore(self) -> None:
        """Put back random states, and `.grad` of the leaves outside the model."""
        for source, state in zip(self._sources, self._states, strict=True):
            source.set(state)
        self._outside.restore()

    def full_graph(self) -> list[StepRecord]:
        """Run two steps of the full graph, and learn from it what all other trials need."""
        self._learning_rate = 0.0
        records = self._run(self._predict_full_graph, learns=True)
        made_in_forward = records[0].gradients.keys() - records[-1].gradients.keys()
        for name in made_in_forward:
            del records[0].gradients[name]
        return records

    def repeat_full_graph(self, records: list[StepRecord], scale: float) -> list[StepRecord]:
        """Run the full graph again with a loss of another scale, each step from the parameters of the first time."""
        return self._run(self._predict_full_graph, scale=scale, follows=records)

    def multipose(self, **options: Any) -> list[StepRecord]:
        """Run two steps of a `MultiPose`.

        Args:
            **options: Those of the user, changed; copies take the places of the call and of the generators.
        """

        def predict(copied: IndependentCopy) -> Predict:
            copies = {name: copied.options[name] for name in COPIED_OPTIONS if name in copied.options}
            scorer = MultiPose(copied.model, copied.combination, **{**options, **copies})
            return lambda poses: scorer(poses, groups=self._batch.groups)

        return self._run(predict)

    def _predict_full_graph(self, copied: IndependentCopy) -> Predict:
        options = copied.options

        def predict(poses: Any) -> MultiPosePrediction:
            batch = TrainingBatch(
                copied.model,
                poses,
                copied.combination,
                self._batch.groups,
                options.get("call"),
                options.get("collate"),
            )
            chunk_size = options.get("chunk_size") or 1
            return full_graph_prediction(batch, chunk_size, options.get("nonfinite", Options.nonfinite))

        return predict

    def _run(
        self,
        make_predict: Callable[[IndependentCopy], Predict],
        *,
        learns: bool = False,
        scale: float = 1.0,
        follows: list[StepRecord] | None = None,
    ) -> list[StepRecord]:
        self.restore()
        copied = IndependentCopy(self._batch)
        predict = make_predict(copied)
        records: list[StepRecord] = []
        for number in range(STEPS):
            poses = copied.copy_poses()
            leaves = copied.leaves(poses)
            for leaf in (*leaves.values(), *self._outside.by_name.values()):
                leaf.grad = None
            prediction = predict(poses.poses)
            loss = copied.loss(prediction)
            if learns:
                if not (prediction.combined.requires_grad and loss.requires_grad):
                    raise NoGradientError
                self._outside.find(loss, leaves.values())
            # Parts of the graph that lie outside the model are there only once.
            (loss * scale).backward(retain_graph=bool(self._outside.by_name))
            gradients = read_gradients({**leaves, **self._outside.by_name}, scale)
            if learns and number == 0:
                self._learn_scales(loss, leaves)
            self._step(leaves)
            if follows is not None:
                set_parameters(copied, follows[number].contents)
            records.append(StepRecord(gradients, read_copy(copied)))
        return records

    def _learn_scales(self, loss: Tensor, leaves: Mapping[str, Tensor]) -> None:
        pairs = [(leaf, leaf.grad) for leaf in leaves.values() if leaf.grad is not None]
        parameters = sum(norm_of(leaf) ** 2 for leaf, _ in pairs) ** 0.5
        gradients = sum(norm_of(gradient) ** 2 for _, gradient in pairs) ** 0.5
        rate = RELATIVE_STEP * parameters / gradients if gradients else 0.0
        self._learning_rate = rate if rate < float("inf") else 0.0
        self.narrowest = narrowest_dtype(loss)
        self.draws = any(
            plain_value(source.get()) != plain_value(state)
            for source, state in zip(self._sources, self._states, strict=True)
        )

    def _step(self, leaves: Mapping[str, Tensor]) -> None:
        trained = [leaf for name, leaf in leaves.items() if name.startswith("parameter ") and leaf.grad is not None]
        if trained:
            torch.optim.SGD(trained, lr=self._learning_rate).step()

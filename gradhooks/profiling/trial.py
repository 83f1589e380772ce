"""Trials: two training steps on a copy of the model, in plain PyTorch or with `MultiPose`, and all that they leave."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradhooks.engine.graph_leaves import reached_leaves
from gradhooks.options import Options
from gradhooks.prediction import MultiPosePrediction
from gradhooks.profiling.gradient_error import norm_of
from gradhooks.profiling.independent_copy import COPIED_OPTIONS, CheckedBatch, IndependentCopy
from gradhooks.profiling.model_contents import TensorContent, plain_value, read_contents
from gradhooks.profiling.precision import narrowest_dtype
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.profiling.training_steps import full_graph_prediction
from gradhooks.random_state import default_source, generator_source, global_sources, user_sources
from gradhooks.wrapper import MultiPose

STEPS = 2
RELATIVE_STEP = 1e-3  # the size of the optimizer's update, relative to that of the parameters

Predict = Callable[[Any], MultiPosePrediction]


class NoGradientError(Exception):
    """Internal: the prediction of the full graph, or the loss, does not require grad."""


class StepRecord(NamedTuple):
    """What one step leaves.

    Attributes:
        gradients: Of all leaves, by name.
        contents: Of the model and the combination, by name, after the step of the optimizer.
    """

    gradients: dict[str, Tensor | None]
    contents: dict[str, Any]


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
        self._outside: dict[str, Tensor] = {}  # leaves that are neither in the model nor in the poses
        self._user_gradients: dict[str, Tensor | None] = {}
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
        for name, gradient in self._user_gradients.items():
            self._outside[name].grad = gradient

    def full_graph(self) -> list[StepRecord]:
        """Run two steps of the full graph, and learn from it what all other trials need."""
        self._learning_rate = 0.0
        records = self._run(self._predict_full_graph, learns=True)
        persistent = set(records[0].gradients) & set(records[1].gradients)  # others are made anew in each forward
        for record in records:
            for name in set(record.gradients) - persistent:
                del record.gradients[name]
        self._outside = {name: leaf for name, leaf in self._outside.items() if name in persistent}
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
            for leaf in (*leaves.values(), *self._outside.values()):
                leaf.grad = None
            prediction = predict(poses.poses)
            loss = copied.loss(prediction)
            if learns:
                if not (prediction.combined.requires_grad and loss.requires_grad):
                    raise NoGradientError
                self._learn_leaves(loss, leaves)
            # Parts of the graph that lie outside the model are there only once.
            (loss * scale).backward(retain_graph=bool(self._outside))
            gradients = {name: _read_gradient(leaf, scale) for name, leaf in {**leaves, **self._outside}.items()}
            if learns and number == 0:
                self._learn_scales(loss, leaves)
            self._step(leaves)
            if follows is not None:
                _set_parameters(copied, follows[number].contents)
            records.append(StepRecord(gradients, _contents(copied)))
        return records

    def _learn_leaves(self, loss: Tensor, leaves: Mapping[str, Tensor]) -> None:
        known = set(map(id, (*leaves.values(), *self._outside.values())))
        named = list(self._batch.model.named_parameters())
        originals = {id(leaf): name for name, leaf in named}
        for leaf in reached_leaves(loss)[0]:
            if id(leaf) in originals:
                raise TypeError(
                    f"gradcheck compares copies of the model, and the copy uses the parameter {originals[id(leaf)]} of "
                    "the original: a function in an attribute, a hook, call= or loss= closes over the model. Let it "
                    "get the model as an argument, or make it a method; a loss may have a second argument, the model"
                )
            if id(leaf) not in known:
                name = f"leaf {len(self._outside)} outside the model, shape {tuple(leaf.shape)}"
                self._outside[name] = leaf
                self._user_gradients[name] = leaf.grad
                leaf.grad = None

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


def _read_gradient(leaf: Tensor, scale: float) -> Tensor | None:
    return None if leaf.grad is None else leaf.grad.detach().clone() / scale


def _contents(copied: IndependentCopy) -> dict[str, Any]:
    contents = read_contents(copied.model)
    if isinstance(copied.combination, nn.Module):
        combination = read_contents(copied.combination)
        contents.update((f"{name} of the combination", value) for name, value in combination.items())
    for number, generator in enumerate(copied.options.get("generators", ())):
        source = generator_source(generator)
        if source is not None:
            contents[f"the generator generators[{number}]"] = plain_value(source.get())
    return contents


def _set_parameters(copied: IndependentCopy, contents: Mapping[str, Any]) -> None:
    for module, suffix in ((copied.model, ""), (copied.combination, " of the combination")):
        for name, leaf in module.named_parameters() if isinstance(module, nn.Module) else ():
            content = contents.get(f"parameter {name}{suffix}")
            if isinstance(content, TensorContent):
                leaf.data.copy_(content.value)

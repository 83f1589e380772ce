"""IndependentCopy: a deep copy of a model and of what runs it, so that trials share nothing with the user's objects."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradhooks import registry
from gradhooks.engine.nested import map_tensors, tensors_in
from gradhooks.groups import Groups
from gradhooks.prediction import MultiPosePrediction
from gradhooks.profiling.checked_batch import CheckedBatch, takes_model
from gradhooks.profiling.deep_copy import deep_copy, is_uninitialized, make_leaves, widen

COPIED_OPTIONS = ("call", "collate", "generators")


class IndependentCopy:
    """A deep copy of a model, and of the combination, the loss and the options as far as they are objects.

    Functions are not copied: what they close over is shared with the user.

    Args:
        batch: What the user passed.

    Attributes:
        model: The copy of the model.
        combination: The copy of the combination; None if there is none.
        options: The options, with copies of generators that the model holds.

    Raises:
        TypeError: The model cannot be copied. The message names the part.
    """

    def __init__(self, batch: CheckedBatch) -> None:
        self._batch = batch
        self._memo: dict[int, Any] = {}
        self.model: nn.Module = deep_copy(batch.model, self._memo, "the model")
        make_leaves(batch.model, self.model)
        named = batch.combination
        combination = None if named is None else registry.combinations.resolve(named)
        self.combination: Any = deep_copy(combination, self._memo, "the combination")
        self._loss: Any = deep_copy(batch.loss, self._memo, "the loss")
        self.options = {name: self._copied_option(name, value) for name, value in batch.options.items()}
        if batch.wide:
            if is_uninitialized(self.model):
                self.model.double()
            modules = [module for module in (self.model, self.combination) if isinstance(module, nn.Module)]
            registered = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
            widen([*registered, *_tensors_of(self._memo)])

    def _copied_option(self, name: str, value: Any) -> Any:
        if name in ("call", "collate"):
            return deep_copy(value, self._memo, f"the option {name}")
        if name == "generators":  # those in closures are not copied, and must be the same objects
            return tuple(self._memo.get(id(generator), generator) for generator in value)
        return value

    def loss(self, prediction: MultiPosePrediction) -> Tensor:
        """Return the loss; a function of two arguments also gets the copy of the model."""
        loss: Tensor = self._loss(prediction, self.model) if takes_model(self._loss) else self._loss(prediction)
        return loss

    def copy_poses(self) -> "CopiedPoses":
        """Return a fresh copy of the poses. Tensors with a graph become leaves that require grad."""
        memo = dict(self._memo)
        poses = self._batch.poses
        if isinstance(poses, Groups):
            poses = replace(poses, poses=_without_graphs(poses.poses))
        else:
            poses = _without_graphs(poses)
        copied = deep_copy(poses, memo, "a pose")
        tensors = [value for key, value in memo.items() if key not in self._memo and isinstance(value, Tensor)]
        if self._batch.wide:
            widen(tensors)
        return CopiedPoses(copied, tensors)

    def leaves(self, poses: "CopiedPoses") -> dict[str, Tensor]:
        """Return the parameters, frozen or not, and all other leaves that require grad, by name."""
        found: dict[str, Tensor] = {f"parameter {name}": leaf for name, leaf in self.model.named_parameters()}
        if isinstance(self.combination, nn.Module):
            parameters = self.combination.named_parameters()
            found.update((f"parameter {name} of the combination", leaf) for name, leaf in parameters)
        inside = poses.poses.poses if isinstance(poses.poses, Groups) else poses.poses
        found.update((path, tensor) for path, tensor in tensors_in(inside, "poses") if _is_trained(tensor))
        for place, tensors in (("a pose", poses.tensors), ("the model", _tensors_of(self._memo))):
            known = set(map(id, found.values()))
            others = [tensor for tensor in tensors if _is_trained(tensor) and id(tensor) not in known]
            found.update((f"leaf {n} in {place}, shape {tuple(each.shape)}", each) for n, each in enumerate(others))
        return found


class CopiedPoses(NamedTuple):
    """A copy of the poses, and the tensors that were copied for it."""

    poses: Any
    tensors: list[Tensor]


def _is_trained(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad


def _tensors_of(memo: Mapping[int, Any]) -> list[Tensor]:
    return [value for value in memo.values() if isinstance(value, Tensor)]


def _without_graphs(poses: Any) -> Any:
    """Return the poses as a form that can be copied: a list if they are an iterator, tensors with a graph as leaves."""
    if isinstance(poses, Iterator):
        raise TypeError("gradcheck runs the poses several times; pass a list of poses, not an iterator")

    def leaf(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_leaf else tensor.detach().requires_grad_()

    return map_tensors(leaf, poses)

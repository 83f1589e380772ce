"""ModelParts: what is found by walking a model, kept from batch to batch while the model is unchanged."""

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.distributed.validation import synchronizing_modules
from gradhooks.engine.findings import Findings  # noqa: TC001 - the annotation of an attribute
from gradhooks.engine.model_state import ModelState
from gradhooks.engine.open_graphs import OpenGraphs
from gradhooks.engine.shadow_parameters import ShadowParameters, refuse_concurrent_use
from gradhooks.engine.training_flags import TrainingFlags
from gradhooks.numerics import at_least_float32


class ModelParts:
    """The modules of a model, its state, and the shadows of its parameters.

    Args:
        model: The bare model.
        generators: Random sources of the model; see `ModelState`.

    Attributes:
        state: Snapshots of the model's state.
        device: The device of the model.
        gradient_bytes: One copy of the gradients, in the dtype of sums.
        has_lazy_parameters: Whether a lazy parameter or buffer has no shape yet.
        trainable: Whether any parameter requires grad.
        synchronizing: Modules that may synchronize ranks in each pose, with their paths.
        findings: What the audit found out, by mode. Written by `forward_pass.py`.

    Raises:
        ConcurrentUseError: Another thread runs a batch through the model.
    """

    def __init__(self, model: nn.Module, generators: Sequence[object]) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._generators = generators
        self._fingerprint = _fingerprint(self._modules)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            refuse_concurrent_use(parameter)
        self.state = ModelState(model, generators)
        self.gradient_bytes = sum(
            parameter.numel() * at_least_float32(parameter.dtype).itemsize
            for parameter in trainable
            if not is_lazy(parameter)
        )
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.has_lazy_parameters = any(map(is_lazy, chain(model.parameters(), model.buffers())))
        self.trainable = bool(trainable)
        self.synchronizing = synchronizing_modules(model)
        self._sharded = ShardedModel(model)
        self._shadows: ShadowParameters | None = None
        self._trainable_ids = list(map(id, trainable))
        self._is_current = True
        self.findings: dict[Hashable, Findings] = {}

    def take_over(self, former: "ModelParts") -> None:
        """Take over what the audit found out about the same model, if the same parameters are trained."""
        if self._model is former._model and self._trainable_ids == former._trainable_ids:
            self.findings = former.findings
            self.state.add_generators(former.state.found_generators)

    def are_current(self, generators: Sequence[object]) -> bool:
        """Return whether modules, parameters and generators are still the same."""
        return self._is_current and generators is self._generators and _fingerprint(self._modules) == self._fingerprint

    def recover(self) -> None:
        """Put back the state before this call, which raised; the next one begins with new parts."""
        self._is_current = False
        self.state.recover()

    @property
    def sharded(self) -> ShardedModel:
        """How the parameters are sharded, if they are; parameters that FSDP2 left unsharded are resharded."""
        return ShardedModel(self._model) if self._sharded else self._sharded

    @property
    def shadows(self) -> ShadowParameters:
        """The shadows of the trainable parameters, made when they are first needed."""
        if self._shadows is None:
            self._shadows = ShadowParameters(self._model)
        return self._shadows

    @property
    def flags(self) -> TrainingFlags:
        """The training flag of each module."""
        return [(module, module.training) for module in self._modules if hasattr(module, "training")]


class ModelPartsCache:
    """Keeps the `ModelParts` of one model. A copy or a pickle of it is empty.

    Attributes:
        open_graphs: What the batches of this model hold until their backward.
    """

    def __init__(self) -> None:
        self.open_graphs = OpenGraphs()
        self._parts: ModelParts | None = None

    def get(self, model: nn.Module, generators: Sequence[object]) -> ModelParts:
        """Return the parts of `model` as it is now."""
        parts = self._parts
        if parts is None or parts._model is not model or not parts.are_current(generators):
            self._parts = None  # an error must not leave the old parts
            former, parts = parts, ModelParts(model, generators)
            if former is not None:
                parts.take_over(former)
            self._parts = parts
        return parts

    def begin(self) -> None:
        """Begin a call, to which `recover` refers."""
        if self._parts is not None:
            self._parts.state.forget_before()

    def recover(self) -> None:
        """Put back the state of the model before this call, which raised."""
        if self._parts is not None:
            self._parts.recover()

    def __deepcopy__(self, memo: object) -> "ModelPartsCache":
        return ModelPartsCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ModelPartsCache, ())


def _fingerprint(modules: Sequence[nn.Module]) -> list[Any]:
    """Return values that differ if a module, a parameter or the name of a buffer was added, removed or replaced.

    A parameter also counts as replaced when it gets other storage (`.to()`, `p.data =`) or another `requires_grad`.
    """
    found: list[Any] = []
    for module in modules:
        found.extend(map(id, module._modules.values()))
        found.extend(module._buffers.keys())
        found.extend(map(_describe_parameter, module._parameters.values()))
    return found


def _describe_parameter(parameter: Tensor | None) -> object:
    if type(parameter) is not nn.Parameter:  # None, lazy, or a subclass that may have no storage
        return None if parameter is None else (id(parameter), type(parameter), parameter.requires_grad)
    return id(parameter), parameter.requires_grad, parameter.data_ptr(), parameter.shape, parameter.stride()

"""ModelParts: what is found by walking a model, kept from batch to batch while the model is unchanged."""

from collections.abc import Hashable, Sequence
from itertools import chain
from operator import attrgetter, methodcaller
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

_flag_of = attrgetter("requires_grad")
_shape_of = attrgetter("shape")
_tables_of = attrgetter("_modules", "_buffers", "_parameters")
_keys_of, _values_of = methodcaller("keys"), methodcaller("values")


class ModelParts:
    """The modules of a model, its state, and the shadows of its parameters.

    Args:
        model: The bare model.
        generators: Random sources of the model; see `ModelState`.

    Attributes:
        state: Snapshots of the model's state.
        device: The device of the model.
        device_types: The kinds of devices in use.
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
        self._fingerprint = _Fingerprint(self._modules)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            refuse_concurrent_use(parameter)
        self.state = ModelState(model, generators)
        self.device_types = tuple([device.type for device in self.state.devices])
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
        return self._is_current and generators is self._generators and self._fingerprint.is_current()

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


class _Fingerprint:
    """Tells in a few calls of C whether a module, a parameter or the name of a buffer was added, removed or replaced.

    A parameter also counts as replaced when it gets other storage (`.to()`, `p.data =`) or another `requires_grad`.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._contents, parameters = self._read_contents()
        held = [parameter for parameter in parameters if parameter is not None]
        self._parameters = held
        self._placed = [each for each in held if type(each) is nn.Parameter]  # others may have no storage
        self._properties = self._read_properties()

    def is_current(self) -> bool:
        """Return whether everything is as it was."""
        return self._read_contents()[0] == self._contents and self._read_properties() == self._properties

    def _read_contents(self) -> tuple[list[Any], list[Any]]:
        """Return what identifies submodules, buffers and parameters; and the parameters."""
        submodules, buffers, parameters = zip(*map(_tables_of, self._modules), strict=True)
        held = list(chain.from_iterable(map(_values_of, parameters)))
        found = chain(chain.from_iterable(map(_values_of, submodules)), held)
        return [*map(id, found), *map(type, held), *chain.from_iterable(map(_keys_of, buffers))], held

    def _read_properties(self) -> tuple[list[Any], ...]:
        return (
            list(map(_flag_of, self._parameters)),
            list(map(Tensor.data_ptr, self._placed)),
            list(map(_shape_of, self._placed)),
            list(map(Tensor.stride, self._placed)),
        )

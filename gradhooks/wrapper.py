"""MultiPose: the module that a user wraps around a model. It sequences the steps; the engine does them."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from gradhooks import registry
from gradhooks.accumulators.base import Accumulator
from gradhooks.combination import BoundCombination
from gradhooks.distributed.agreement import Agreement
from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.distributed.validation import refuse_sharded_parameters, refuse_synchronized_modules
from gradhooks.engine.batch_setup import read_batch
from gradhooks.engine.learned import Learned
from gradhooks.engine.model_parts import ModelPartsCache
from gradhooks.engine.recovery import leaves_no_trace
from gradhooks.engine.report import Report
from gradhooks.forward_pass import run_batch
from gradhooks.learned_attribute import LearnedAttribute
from gradhooks.options import OPTION_NAMES, OptionAttributes, Options, OptionTypes, refuse_unknown_options
from gradhooks.prediction import MultiPosePrediction, combine
from gradhooks.state_dict import BareModelKeys

ModelT = TypeVar("ModelT", bound=nn.Module)


class MultiPose(BareModelKeys, OptionAttributes, LearnedAttribute, Generic[ModelT]):
    """Runs groups of poses through a model, in chunks, and combines the predictions of each group.

    `loss.backward()` fills `.grad` with the gradient of the full graph, which contains the graphs of all poses, with
    about the memory of one pose.

    Args:
        model: Any module. It is neither copied nor changed.
        combination: A registered name, or an object: a `Combination`, or any callable from predictions of shape
            `(N, *prediction)` to a tensor. With None, `combined` is `per_pose`, for losses on the predictions.
        combination_options: The options of a combination that is given by its name: `{"features": 64}`.
        accumulator: A registered name or an `Accumulator`.
        memory: What a step may need beyond the model, its `.grad` and the step of one pose: bytes, a string such as
            `"2GiB"`, or a fraction of what is free on the model's device when the first batch comes. Poses whose graphs
            fit run as in plain PyTorch, and only the rest is intercepted. 0 is the least.
        chunk_size: How many poses go through the model at once. By default as many as fit in `memory`, and one where a
            prediction depends on the other poses of its chunk (batch normalization in training).
        collate: Makes the model's input from a list of poses, with one row per pose; needed to run several poses of a
            list at once.
        call: `call(model, pose)` returns the prediction of a pose, or `(prediction, side)`: side losses, router logits,
            anything of one shape for all poses, which comes back as `prediction.side`. By default a tuple is passed as
            `model(*pose)`, a mapping as `model(**pose)`, anything else as `model(pose)`.
        tolerance: Poses with a coefficient of at most this size relative to the largest get no backward. None changes
            the result by less than half a rounding error; 0 skips exact zeros only.
        nonfinite: What to do with NaN and infinite predictions: "propagate" as the full graph does, "raise", or "drop".
        generators: Random sources of the model that are not found by themselves, restored for a second run.
        process_group: Ranks that share each group, or a `DeviceMesh` of one axis. Each rank passes poses of its own, or
            none, and gets the predictions of all, in the order of the ranks. Combination and loss must be the same on
            all ranks; `.grad` is then on each what one process with all poses would have.
        audit: Whether to run a pose twice, without a trace, before poses are intercepted for the first time in each
            mode of the model, so that models whose gradients would be wrong are refused.
        progress: True for a bar (needs tqdm), or a function of `(done, total)`, called after each chunk.

    Attributes (and all options, validated when they are set):
        model: The bare model.
        report: The `Report` of the last batch.
        learned: What earlier batches have shown; save it beside the state dict, and assign it on resuming.

    Raises:
        TypeError: An option does not exist, or has the wrong type.
        ValueError: An option is out of range, or the accumulator does not use it.
        PluginError: A name is unknown, its plugin cannot be imported, or `combination_options` do not fit it.
    """

    # Read by the Trainer of transformers: keyword arguments of forward go to the combination, not to a loss.
    accepts_loss_kwargs = False

    model: ModelT
    combination: Any
    report: Report
    options: Options
    _accumulator: Accumulator

    def __init__(
        self,
        model: ModelT,
        combination: str | Callable[[Tensor], Tensor] | None = "mean",
        *,
        combination_options: Mapping[str, Any] | None = None,
        accumulator: str | Accumulator = "auto",
        **options: Unpack[OptionTypes],
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an instance of torch.nn.Module, got {model!r}")
        refuse_unknown_options(options, ["accumulator", "combination_options", *OPTION_NAMES])
        self.model = model
        self.combination = registry.resolve_combination(combination, combination_options)
        self._agreement = Agreement()
        self._set_options(Options(**options), registry.accumulators.resolve(accumulator))  # type: ignore[arg-type]
        self._learned = Learned()
        self._parts = ModelPartsCache()
        self.report = Report()
        self._use_keys_of_bare_model()

    @property
    def accumulator(self) -> Accumulator:
        """The accumulator; set it by name or as an object."""
        return self._accumulator

    @accumulator.setter
    def accumulator(self, accumulator: str | Accumulator) -> None:
        self._set_options(self.options, registry.accumulators.resolve(accumulator))

    def _change_option(self, name: str, value: Any) -> None:
        self._set_options(self.options.changed(**{name: value}), self.accumulator)

    def _set_options(self, options: Options, accumulator: Accumulator) -> None:
        ignored = sorted(accumulator.ignored_options & options.changed_from_default())
        if ignored:
            names = ", ".join(f"{name}=" for name in ignored)
            raise ValueError(f"the accumulator {accumulator.name!r} does not use {names}; leave it out, or use 'auto'")
        self._agreement.join(options.process_group or ShardedModel(self.model).group)
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "_accumulator", accumulator)

    if TYPE_CHECKING:
        # Hides nn.Module.__getattr__, which makes every attribute valid: a misspelt one is an error.
        __getattr__: None  # type: ignore[assignment, misc]

        def __call__(self, poses: Any, groups: Any = None, **arguments: Any) -> MultiPosePrediction: ...

    else:

        def __getattr__(self, name: str) -> Any:
            if name in (modules := self.__dict__.get("_modules", {})):
                return modules[name]
            try:
                return super().__getattr__(name)
            except AttributeError:
                if "model" not in modules:  # not constructed yet, as during unpickling
                    raise
            try:
                return getattr(self.model, name)
            except AttributeError as error:
                described = f"neither MultiPose nor its model, a {type(self.model).__name__}, has an attribute {name!r}"
                raise AttributeError(described, name=name, obj=self) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTION_NAMES or name == "accumulator":
            object.__setattr__(self, name, value)
        elif name == "combination":
            combination = registry.resolve_combination(value)
            self.__dict__.pop(name, None)  # a callable that is not a module is a plain attribute, a module a child
            self._modules.pop(name, None)
            super().__setattr__(name, combination)
        elif self._belongs_to_model(name):  # mirrors __getattr__: assigning scorer.head replaces model.head
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def _belongs_to_model(self, name: str) -> bool:
        if "report" not in self.__dict__:  # the last attribute that __init__ sets
            return False
        if name in self.__dict__ or name in self._modules or hasattr(MultiPose, name):
            return False
        model = self.model
        return any(name in names for names in (model.__dict__, model._modules, model._parameters, model._buffers))

    def extra_repr(self) -> str:
        options = self.options
        shown = [
            f"accumulator={self.accumulator}",
            f"memory={options.memory!r}",
            f"chunk_size={options.chunk_size!r}",
        ]
        if not isinstance(self.combination, nn.Module):  # modules are printed as children
            shown.insert(0, f"combination={BoundCombination(self.combination, 1).name}")
        changed = options.changed_from_default() - {"memory", "chunk_size"}
        return ", ".join([*shown, *(f"{name}={getattr(options, name)!r}" for name in sorted(changed))])

    def forward(self, poses: Any, groups: Any = None, **arguments: Any) -> MultiPosePrediction:
        """Predict a group, or a batch of groups.

        Args:
            poses: An iterable of poses, or a tensor or mapping of tensors with the poses along axis 0, of which the
                model gets slices, and for which it returns a row per pose. A Dataset or a DataLoader is read while it
                runs, and again for a second run. Or `Groups`, which contain poses and groups.
            groups: The group of each pose: integers from 0 to B - 1, shape `(M,)`, in any order. Without it all poses
                are one group.
            **arguments: Passed to the combination: masks, weights of the poses, known energies. A tensor with `N` rows
                has one row per pose; with a `process_group`, per pose of all ranks, in their order.

        Returns:
            `combined`, shape `(B, *prediction)` or, for one group, `(*prediction)`, and `per_pose`, shape
            `(M, *prediction)`, both part of autograd's graph.

        Raises:
            PosesError: There are no poses, they have no usable form, or the group numbers do not fit them.
            PredictionError: The model's output is not a floating-point tensor of one shape for all poses, is not finite
                although it must be, or does not require grad although the model has trainable parameters.
            CombinationError: The combination does not take an argument, or returns something unusable.
            UnregisteredTensorError, OutlivingGraphError, NonlinearBackwardError, ReplayError: The gradient of
                intercepted poses would be wrong; the message says why, and names the way out.
            DistributedError: Ranks differ, another one failed, or the model is sharded in a way that is not served.
            ConcurrentUseError: Another thread runs poses through the model.
        """
        run = _run_outside_compiler if torch.compiler.is_compiling() else MultiPose._run
        return run(self, poses, groups, arguments)

    @leaves_no_trace(lambda scorer, *_: scorer._parts)
    def _run(self, poses: Any, groups: Any, arguments: dict[str, Any]) -> MultiPosePrediction:
        accumulator, options = self._accumulator, self.options
        parts = self._parts.get(self.model, options.generators)
        refuse_synchronized_modules(self.model, parts.synchronizing)
        if sharded := parts.sharded:
            ranks = Collectives(options.process_group)
            refuse_sharded_parameters(sharded, ranks, accumulator.name, supports_sharded=accumulator.supports_sharded)
        batch = read_batch(
            self.model,
            options,
            self.combination,
            poses,
            groups=groups,
            arguments=arguments,
            parts=parts,
            sharded=sharded,
            learned=self._learned,
            cache=self._parts,
            agreement=self._agreement,
        )
        self.__dict__["report"] = batch.report  # __setattr__ would look for the name in the model
        for_combination, for_user, side = run_batch(batch, accumulator)
        return combine(batch.combination, for_combination, for_user, options.nonfinite, side=side)


# The signature that help() and editors show at run time; type checkers read `Unpack[OptionTypes]`.
_parameters = list(inspect.signature(MultiPose.__init__).parameters.values())[:-1]
_parameters += list(inspect.signature(Options).parameters.values())
MultiPose.__init__.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]


# A compiler could only break the graph at every step. A compiled model inside stays compiled.
_run_outside_compiler = torch._disable_dynamo(MultiPose._run)  # type: ignore[attr-defined]

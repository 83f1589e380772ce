"""MultiPose: the only place that sequences the steps."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from gradhooks import registry, state_dict
from gradhooks.accumulators.base import Accumulator
from gradhooks.autograd_function import tied_to_leaves
from gradhooks.combination import BoundCombination
from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.pose_parallel import PosePartition
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.distributed.validation import refuse_sharded, refuse_synchronized_modules, refuse_to_share
from gradhooks.engine.chunk_sizes import ChunkSize, ChunkSizes, ChunkSizeState
from gradhooks.engine.context import Group
from gradhooks.engine.forward import send_through
from gradhooks.engine.model_state import ModelState
from gradhooks.engine.pose_inputs import (
    Call,
    Collate,
    Nonfinite,
    Poses,
    arrange,
    call_model,
    finite_rows,
)
from gradhooks.engine.prediction_only import predict
from gradhooks.engine.progress import Progress
from gradhooks.engine.report import Report
from gradhooks.engine.shadow_parameters import ShadowParameters
from gradhooks.engine.training_flags import initialise_lazy, modes_of
from gradhooks.errors import PosesError, PredictionError
from gradhooks.prediction import MultiPosePrediction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


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
        chunk_size: How many poses go through the model at once with a graph. `"auto"` is as many as fit in half of the
            memory that is free before the first group, and half as many whenever it runs out: the group is then begun
            again, and later ones know.
        forward_chunk_size: How many go through at once where no graph is kept; None is `chunk_size`. Other batch sizes
            can mean other kernels, so agreement to the last bit is given up where the two differ.
        collate: Makes the model's input of a list of poses, so that it gives a row for each; needed to chunk a list.
        tolerance: A pose whose coefficient is this small relative to the largest gets no backward. None is the largest
            tolerance that leaves the result within half a rounding error; 0 skips only what is exactly zero.
        nonfinite: What to do with a prediction that is NaN or infinite: let it through as the full graph would, raise,
            or leave the pose out of the combination.
        generators: Random sources that the model draws from beside PyTorch's default generators (a
            `torch.Generator`, one of numpy's, the modules `random` and `numpy.random`): a second run then draws alike.
        process_group: Collectives that share every group, or a `DeviceMesh` of one axis. Each passes its own poses, any
            number, also none, and all get the predictions of all, in the order of the ranks. Combination and loss are
            to be computed alike on all of them; `.grad` is then on each what one process with all poses would have.
        progress: True for a bar where tqdm is installed, or a function of `(done, total)`, called after each chunk.

    Attributes:
        report: The `Report` of the last group.
    """

    # Of Hugging Face's Trainer: keyword arguments of the forward go to the combination, not to a loss.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        combination: str | Callable[[Tensor], Tensor] = "mean",
        *,
        accumulator: str | Accumulator = "auto",
        call: Call | None = None,
        chunk_size: ChunkSize = 1,
        forward_chunk_size: ChunkSize | None = None,
        collate: Collate | None = None,
        tolerance: float | None = None,
        nonfinite: Nonfinite = "propagate",
        generators: Iterable[object] = (),
        process_group: "ProcessGroup | DeviceMesh | None" = None,
        progress: Progress = False,
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
        self._experience = ChunkSizeState()
        self.collate = collate
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), relative to the largest coefficient, got {tolerance}")
        self.tolerance = tolerance
        if nonfinite not in get_args(Nonfinite):
            raise ValueError(f"nonfinite must be one of {', '.join(get_args(Nonfinite))}, got {nonfinite!r}")
        self.nonfinite = nonfinite
        self.generators = tuple(generators)
        self.ranks = Collectives(process_group)
        self.progress = progress
        self.report = Report()
        state_dict.use_keys_of_the_bare_model(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None:  # not constructed yet, as while unpickling
                raise
            return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # As it is read: a head that is exchanged is the model's, not one of the wrapper's that nobody would use.
        if "report" in self.__dict__ and self._is_of_the_model(name):  # what is set last in `__init__`
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_the_model(self, name: str) -> bool:
        if name in self.__dict__ or name in self._modules or hasattr(MultiPose, name):
            return False
        model = self.model
        return any(name in there for there in (model.__dict__, model._modules, model._parameters, model._buffers))

    def _fqn_modifiers(self) -> dict[str, str]:
        # What torch's distributed checkpoints ask of a module whose state_dict hooks change keys.
        return state_dict.hidden_parents(self, self.model)

    def forward(self, poses: Any, **arguments: Any) -> MultiPosePrediction:
        """Predict a group.

        Args:
            poses: An iterable of poses, or a tensor or mapping of tensors with the poses along axis 0, which the model
                gets in slices and answers with a row for each.
            **arguments: Go to the combination: masks, weights of the poses, known energies. A tensor with `N` rows has
                one for each pose; with a `process_group`, for each pose of all ranks, in their order.

        Returns:
            `(combined, poses)`, both part of the user's graph.

        Raises:
            PosesError: The group is empty or no group.
            PredictionError: What the model returned is no floating-point tensor of one shape for all poses, is not
                finite though it must be, or does not require grad although something could be trained.
            UnregisteredTensorError: It depends on a leaf that cannot be intercepted.
            DistributedError: The model holds a data-parallel wrapper, or is sharded; or a rank of the `process_group`
                has failed, and all stop.
            ConcurrentUseError: Another thread is running a group through the model.
        """
        # A compiler could only break at every step of what follows; models that are compiled themselves stay so.
        run = _outside_compiler if torch.compiler.is_compiling() else MultiPose._run
        return run(self, poses, arguments)

    def _run(self, poses: Any, arguments: dict[str, Any]) -> MultiPosePrediction:
        refuse_synchronized_modules(self.model)
        sharding = ShardedModel(self.model)
        if sharding:
            refuse_sharded(sharding, self.ranks, self.accumulator.name, recomputes=self.accumulator.recomputes)
        with self.ranks.together("taking its poses", 1) as notes:
            arranged, shadows = self._arranged(poses, sharding)
            notes.told = [len(arranged)]
        share = PosePartition(self.ranks, [int(count) for (count,) in notes.heard])
        if share.total == 0:
            raise PosesError("the group is empty on every rank: a group needs at least one pose")
        self.report = Report(poses=len(arranged), accumulator=self.accumulator.name)
        combination = BoundCombination(self.combination, share.total, arguments)
        group = Group(
            model=self.model,
            call=self.call,
            poses=arranged,
            share=share,
            sharding=sharding,
            shadows=shadows,
            replay=ModelState(self.model, self.generators),
            combination=combination,
            tolerance=self.tolerance,
            nonfinite=self.nonfinite,
            progress=self.progress,
            report=self.report,
            modes=modes_of(self.model),
            sizes=ChunkSizes(self.chunk_size, self.forward_chunk_size, self._experience),
            makes_leaves=bool(sharding),  # or it may mark the user's own inputs
        )
        if not (torch.is_grad_enabled() and shadows.real):
            predictions = predict(group)
            return self._combined(combination, predictions, predictions)
        accumulation, predictions = send_through(group, self.accumulator)
        through_combination, direct = tied_to_leaves(group, accumulation, predictions)
        return self._combined(combination, through_combination, direct)

    def _arranged(self, poses: Any, sharding: ShardedModel) -> tuple[Poses, ShadowParameters]:
        """The poses of this process, and stand-ins for what they and the model would train."""
        arranged = arrange(poses, self.collate, may_be_empty=not self.ranks.alone)
        if (self.chunk_size, self.forward_chunk_size) != (1, 1) and not arranged.batched:
            raise PosesError(
                "chunks of more than one pose need collate= to make a batch of a list, or poses stacked in a tensor"
            )
        initialise_lazy(self.model, lambda: self.call(self.model, arranged.between(0, 1)))
        shadows = ShadowParameters(None if sharding else self.model)
        if torch.is_grad_enabled():
            if sharding and any(parameter.requires_grad for parameter in self.model.parameters()):
                shadows.cut(torch.zeros((), requires_grad=True))  # what ties the predictions to autograd's graph
            arranged = arranged.cut(shadows.cut)
        if not self.ranks.alone:
            refuse_to_share(shadows.inputs, self.combination)
        return arranged, shadows

    def _combined(self, combination: BoundCombination, predictions: Tensor, poses: Tensor) -> MultiPosePrediction:
        """Combine `predictions`; the user gets `poses`, the same numbers. Both have shape `(N, *prediction)`."""
        finite = None
        if self.nonfinite == "drop":
            finite = finite_rows(predictions)
            if not finite.any():
                raise PredictionError(f"none of the {len(finite)} predictions of the group is finite: nothing is left")
        return MultiPosePrediction(combination(predictions, finite), poses, combination, finite)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _outside_compiler(scorer: MultiPose, poses: Any, arguments: dict[str, Any]) -> MultiPosePrediction:
    return scorer._run(poses, arguments)


def _at_least_one(name: str, value: ChunkSize) -> ChunkSize:
    if value != "auto" and (isinstance(value, str) or value < 1):
        raise ValueError(f"{name} must be at least 1, or 'auto', got {value!r}")
    return value

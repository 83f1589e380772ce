"""Models whose parameters are sharded over ranks, by FSDP2 (`fully_shard`) or tensor parallelism.

Rules:
    1. Sharded parameters have no shadows: FSDP2 sets the unsharded ones into their modules at each forward. The
       backwards of the poses end in the real leaves instead, inside the outer backward.
    2. All ranks run the same number of backwards and only the last one synchronizes, so the number of collectives does
       not grow with the number of poses.
    3. For the same reason parameters are unsharded before the first pose of a pass, and stay so until its last.
    4. So every failure of one rank in a pass, but for the last backward, is exchanged before the other ranks wait for
       that rank (`all_or_none`).
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor, nn

from gradhooks.distributed.collectives import Collectives, Message
from gradhooks.distributed.status import Call
from gradhooks.errors import DistributedError


class ShardedModel:
    """Shards of a model's parameters. False if the model has none.

    Args:
        model: Any model. Parameters that FSDP2 left unsharded are resharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._fsdp_modules: list[Any] = []
        self._mesh_axes: list[Collectives] = []
        # A process that shards parameters has imported this module, so other processes need no search.
        if "torch.distributed.tensor" not in sys.modules:
            return
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None:
            self._fsdp_modules = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
        self._reshard()
        sharded = [part.sharded_param for part in self._fsdp_parameters()]
        special = [parameter for parameter in model.parameters() if type(parameter) is not nn.Parameter]
        meshes = [tensor.device_mesh for tensor in (*special, *sharded) if hasattr(tensor, "device_mesh")]
        groups = {group.group_name: group for mesh in meshes for group in mesh.get_all_groups()}
        self._mesh_axes = [Collectives(group) for group in groups.values()]

    def __bool__(self) -> bool:
        return bool(self._mesh_axes)

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """A group of ranks that share shards; None without shards."""
        return self._mesh_axes[0].group if self._mesh_axes else None

    @property
    def call(self) -> Call:
        """The call for which collectives are run."""
        return self._mesh_axes[0].call

    @call.setter
    def call(self, call: Call) -> None:
        for axis in self._mesh_axes:
            axis.call = call

    @property
    def fsdp_root_is_outside(self) -> bool:
        """Whether FSDP2 unshards the parameters in the forward of a module that contains the model."""
        roots = [state._is_root for state, _ in self._parameter_groups()]
        return bool(roots) and not any(root or root is None for root in roots)

    def all_or_none(self, step: str) -> AbstractContextManager[Message]:
        """Run `Collectives.all_or_none` over all ranks of the mesh, and receive the elementwise maximum."""
        return _all_or_none_along(self._mesh_axes, step)

    def gather_objects(self, value: Any) -> list[tuple[int, Any]]:
        """Return an object of each rank of the mesh, with the rank, in rank order; for messages, since it is slow."""
        gathered = [(dist.get_rank(), value)]
        for axis in self._mesh_axes:
            gathered = [each for part in axis.gather_objects(gathered) for each in part]
        return sorted(gathered, key=lambda each: each[0])

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turn an error of the backend in the block into one that names the ranks that do not answer."""
        with ExitStack() as stack:
            for axis in self._mesh_axes:
                stack.enter_context(axis.naming_lost_ranks(runs_model=True))
            yield

    @contextmanager
    def keep_unsharded(self) -> Iterator[None]:
        """Keep parameters unsharded until the block ends, then reshard them (rule 3)."""
        settings = [
            (state, group, group.post_forward_mesh_info, group.reshard_after_backward)
            for state, group in self._parameter_groups()
        ]
        for _, group, _, _ in settings:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        succeeded = False
        try:
            with self.naming_lost_ranks():
                self._unshard()
            yield
            succeeded = True
        finally:
            for state, group, mesh_info, reshards in settings:
                if not succeeded:  # FSDP2 does not reset its state when a forward raises
                    group._training_state = type(group._training_state).IDLE
                    state._training_state = type(state._training_state).IDLE
                    state._state_ctx.iter_forward_root = None
                group.post_forward_mesh_info, group.reshard_after_backward = mesh_info, reshards
                if state._is_root and getattr(state, "_auto_reshard_after_forward", True):
                    group.post_forward_mesh_info = None  # FSDP2's default for a root, set in its first forward
            self._reshard()
            if self._fsdp_modules:
                logger.debug("resharded the parameters of {} FSDP2 modules", len(self._fsdp_modules))

    @contextmanager
    def without_synchronization(self) -> Iterator[None]:
        """Accumulate gradients locally in the block, without reduction over ranks (rule 2)."""
        settings = [(group, group.reduce_grads, group.all_reduce_grads) for _, group in self._parameter_groups()]
        for group, _, _ in settings:
            group.reduce_grads = group.all_reduce_grads = False
        try:
            yield
        finally:
            for group, reduces, all_reduces in settings:
                group.reduce_grads, group.all_reduce_grads = reduces, all_reduces

    @contextmanager
    def restore_grad_on_error(self) -> Iterator[None]:
        """Add the gradients of the block to `.grad` if it succeeds; leave `.grad` as it was if the block raises."""
        saved = [(parameter, parameter.grad) for parameter in self._parameters_of_user()]
        for parameter, _ in saved:
            parameter.grad = None
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if not succeeded:
                self._model.zero_grad()  # clears the unsharded parameters too
            with torch.no_grad():
                for parameter, before in saved:
                    if not succeeded or parameter.grad is None:
                        parameter.grad = before
                    elif before is not None:
                        parameter.grad = before.add_(parameter.grad)

    def _parameters_of_user(self) -> list[nn.Parameter]:
        """Return the parameters that have `.grad` after a step, also while FSDP2 has others in their place."""
        parts = self._fsdp_parameters()
        replaced = {id(getattr(part, "_unsharded_param", None)) for part in parts}
        others = [each for each in self._model.parameters() if id(each) not in replaced]
        return [*{id(each): each for each in (*others, *(part.sharded_param for part in parts))}.values()]

    def used_parameters(self, reached: Iterable[Tensor]) -> bytes:
        """Return whether each parameter of FSDP2 has a gradient, or gets one in a backward that ends at `reached`."""
        ids = set(map(id, reached))
        return bytes(
            part.unsharded_accumulated_grad is not None
            or part.unsharded_param.grad is not None
            or id(part.unsharded_param) in ids
            for part in self._fsdp_parameters()
        )

    def refuse_unequal_use(self, used: bytes) -> None:
        """Refuse that poses of some ranks use parameters that those of others do not.

        Raises:
            DistributedError: It names the first one.
        """
        by_rank = dict(self.gather_objects(used))
        parts = self._fsdp_parameters()
        index = next(index for index in range(len(parts)) if len({each[index] for each in by_rank.values()}) > 1)
        users = [rank for rank, each in by_rank.items() if each[index]]
        raise DistributedError(
            f"the poses of rank {users[0]} use parameter {parts[index]._param_fqn!r}, and those of other ranks do not, "
            "so the ranks would reduce gradients of different sizes, and FSDP2 would abort. Let the poses of all ranks "
            "use the same parameters, for example by adding 0 * parameter.sum() to the predictions, or share them out "
            "by DistributedDataParallel(MultiPose(model), find_unused_parameters=True)"
        )

    def _fsdp_parameters(self) -> list[Any]:
        return [part for _, group in self._parameter_groups() for part in group.fsdp_params]

    def _parameter_groups(self) -> list[tuple[Any, Any]]:
        """Return FSDP2's parameter groups, each with the state of its module."""
        pairs = []
        for module in self._fsdp_modules:
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            pairs += [(state, group) for group in groups if group]
        return pairs

    def _unshard(self) -> None:
        """Gather all parameters (rule 3). Otherwise the others would wait for a rank that fails in its first pose."""
        for module in self._fsdp_modules:
            state = module._get_fsdp_state()
            if state._is_root is None:  # before the first forward: modules come before those inside of them
                state._lazy_init()
            module.unshard()

    def _reshard(self) -> None:
        for module in self._fsdp_modules:
            module.reshard()


@contextmanager
def _all_or_none_along(axes: Sequence[Collectives], step: str) -> Iterator[Message]:
    """Exchange along one mesh axis after the other, so that numbers and faults reach every rank of the mesh."""
    if not axes:
        message = Message()
        yield message
        message.received = [list(message.sent)]
        return
    with axes[0].all_or_none(step) as outer:
        with _all_or_none_along(axes[1:], step) as inner:
            yield inner
        outer.sent = inner.received[0]
    inner.received = [[max(numbers) for numbers in zip(*outer.received, strict=True)]]

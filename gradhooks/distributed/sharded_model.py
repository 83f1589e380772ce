"""Models whose parameters are sharded over ranks, by FSDP2 (`fully_shard`) or tensor parallelism.

Rules:
    1. Sharded parameters have no shadows: FSDP2 sets the unsharded ones into their modules at each forward. The
       backwards of the poses end in the real leaves instead, inside the outer backward.
    2. All ranks run the same number of backwards and only the last one synchronizes, so the number of collectives does
       not grow with the number of poses.
    3. For the same reason parameters stay unsharded from the first pose of a pass to its last.
    4. Every other failure of one rank is exchanged before the other ranks wait for that rank (`all_or_none`).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from loguru import logger
from torch import nn

from gradhooks.distributed.collectives import Collectives, Message


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
        sharded = [part.sharded_param for _, group in self._parameter_groups() for part in group.fsdp_params]
        special = [parameter for parameter in model.parameters() if type(parameter) is not nn.Parameter]
        meshes = [tensor.device_mesh for tensor in (*special, *sharded) if hasattr(tensor, "device_mesh")]
        groups = {group.group_name: group for mesh in meshes for group in mesh.get_all_groups()}
        self._mesh_axes = [Collectives(group) for group in groups.values()]

    def __bool__(self) -> bool:
        return bool(self._mesh_axes)

    @property
    def fsdp_root_is_outside(self) -> bool:
        """Whether FSDP2 unshards the parameters in the forward of a module that contains the model."""
        roots = [state._is_root for state, _ in self._parameter_groups()]
        return bool(roots) and not any(root or root is None for root in roots)

    def all_or_none(self, step: str, numbers: int = 0) -> AbstractContextManager[Message]:
        """Run `Collectives.all_or_none` over all ranks of the mesh, and receive the maximum."""
        return _all_or_none_along(self._mesh_axes, step, numbers)

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
        saved = [(parameter, parameter.grad) for parameter in self._model.parameters() if parameter.grad is not None]
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
                    parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)

    def _parameter_groups(self) -> list[tuple[Any, Any]]:
        """Return FSDP2's parameter groups, each with the state of its module."""
        pairs = []
        for module in self._fsdp_modules:
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            pairs += [(state, group) for group in groups if group]
        return pairs

    def _reshard(self) -> None:
        for module in self._fsdp_modules:
            module.reshard()


@contextmanager
def _all_or_none_along(axes: Sequence[Collectives], step: str, numbers: int) -> Iterator[Message]:
    """Exchange along one mesh axis after the other, so that numbers and faults reach every rank of the mesh."""
    if not axes:
        message = Message()
        yield message
        message.received = [list(message.sent)]
        return
    with axes[0].all_or_none(step, maximum_of=numbers) as outer:
        with _all_or_none_along(axes[1:], step, numbers) as inner:
            yield inner
        outer.sent = inner.received[0]
    inner.received = outer.received

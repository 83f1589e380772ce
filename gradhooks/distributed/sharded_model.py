"""Models whose parameters are spread over ranks: `fully_shard`, and tensor-parallel parameters.

Rules:
    1. Nothing can stand in for such a parameter: FSDP2 puts gathered ones into their modules at each forward. So the
       backwards of the poses end in the real leaves, inside the outer backward.
    2. All ranks run equally many backwards, and the last of them synchronises: not one collective for each pose.
    3. For the same reason parameters that one pose has gathered stay gathered until the last has run.
    4. What else one rank cannot do, it says before the others wait for it (`together`).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from gradhooks.distributed.collectives import Collectives, Message


class ShardedModel:
    """How a model is spread, if it is.

    Args:
        model: Any model. Parameters that FSDP2 had left gathered are put back to their shards.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wrapped: list[Any] = []
        self._axes: list[Collectives] = []
        if "torch.distributed.tensor" not in sys.modules:  # who shards has imported it; others need not be looked at
            return
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None:
            self._wrapped = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
        self._reshard()
        sharded = [part.sharded_param for _, group in self._groups() for part in group.fsdp_params]
        special = [parameter for parameter in model.parameters() if type(parameter) is not nn.Parameter]
        meshes = [tensor.device_mesh for tensor in (*special, *sharded) if hasattr(tensor, "device_mesh")]
        groups = {group.group_name: group for mesh in meshes for group in mesh.get_all_groups()}
        self._axes = [Collectives(group) for group in groups.values()]

    def __bool__(self) -> bool:
        return bool(self._axes)

    @property
    def fsdp_root_is_outside(self) -> bool:
        """Whether FSDP2 gathers the parameters at the call of a module that the model is part of."""
        roots = [state._is_root for state, _ in self._groups()]
        return bool(roots) and not any(root or root is None for root in roots)

    def all_or_none(self, doing: str, numbers: int = 0) -> AbstractContextManager[Message]:
        """`Collectives.all_or_none` over all ranks of the mesh; what is heard is one list: the largest of each number."""
        return _along(self._axes, doing, numbers)

    @contextmanager
    def keep_unsharded(self) -> Iterator[None]:
        """Rule 3."""
        before = [
            (state, group, group.post_forward_mesh_info, group.reshard_after_backward)
            for state, group in self._groups()
        ]
        for _, group, _, _ in before:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            for state, group, mesh_info, reshards in before:
                if not succeeded:  # FSDP2 does not expect that a forward fails, and would believe itself within one
                    group._training_state = type(group._training_state).IDLE
                    state._training_state = type(state._training_state).IDLE
                    state._state_ctx.iter_forward_root = None
                group.post_forward_mesh_info, group.reshard_after_backward = mesh_info, reshards
                if state._is_root and getattr(state, "_auto_reshard_after_forward", True):
                    group.post_forward_mesh_info = None  # as its first forward had decided, perhaps in this block
            self._reshard()

    @contextmanager
    def without_synchronization(self) -> Iterator[None]:
        """Rule 2: backwards in the block add to gradients that no other rank gets to see."""
        before = [(group, group.reduce_grads, group.all_reduce_grads) for _, group in self._groups()]
        for group, _, _ in before:
            group.reduce_grads = group.all_reduce_grads = False
        try:
            yield
        finally:
            for group, reduces, all_reduces in before:
                group.reduce_grads, group.all_reduce_grads = reduces, all_reduces

    @contextmanager
    def restore_grad_on_error(self) -> Iterator[None]:
        """The gradients of the block are added to `.grad` if it ends well; else `.grad` is as before."""
        apart = [(parameter, parameter.grad) for parameter in self._model.parameters() if parameter.grad is not None]
        for parameter, _ in apart:
            parameter.grad = None
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if not succeeded:
                self._model.zero_grad()  # also of gathered parameters
            with torch.no_grad():
                for parameter, before in apart:
                    parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)

    def _groups(self) -> list[tuple[Any, Any]]:
        """FSDP2's groups of parameters, each after the state of its module."""
        found = []
        for module in self._wrapped:
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            found += [(state, group) for group in groups if group]
        return found

    def _reshard(self) -> None:
        for module in self._wrapped:
            module.reshard()


@contextmanager
def _along(axes: Sequence[Collectives], doing: str, numbers: int) -> Iterator[Message]:
    """One axis of the mesh after the other, so that a number, or a fault, gets from every rank to every other."""
    if not axes:
        notes = Message()
        yield notes
        notes.received = [list(notes.sent)]
        return
    with axes[0].all_or_none(doing, numbers, maximum=True) as outer:
        with _along(axes[1:], doing, numbers) as inner:
            yield inner
        outer.sent = inner.received[0]
    inner.received = outer.received

"""Processes that work on one group: what one of them cannot do, none does."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from gradhooks.errors import DistributedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Gradients travel in pieces of this size, so that no second copy of all of them is ever needed.
BUCKET_BYTES = 32 * 2**20


@dataclass
class Message:
    """What each rank tells the others at the end of a common step: a few numbers, equally many from each.

    Attributes:
        sent: Those of this rank.
        received: Those of all, by rank; or one list, with the maximum of each.
    """

    sent: Sequence[float] = ()
    received: list[list[float]] = field(default_factory=list)


class Collectives:
    """The ranks of a process group, or this process alone, which then talks to nobody.

    Args:
        process_group: The group, a `DeviceMesh` of one axis, or None.

    Raises:
        DistributedError: This process is not in the group.
    """

    def __init__(self, process_group: "dist.ProcessGroup | DeviceMesh | None") -> None:
        given: Any = process_group
        self._group: dist.ProcessGroup | None = given.get_group() if hasattr(given, "get_group") else given
        if self._group is not None and dist.get_rank(self._group) < 0:
            raise DistributedError(
                "this process is not in the process_group that shall share the poses; give each process the group that "
                "it is in, as mesh['poses'] does"
            )

    @property
    def is_single(self) -> bool:
        """Whether there is nobody to talk to."""
        return self._group is None

    @property
    def rank(self) -> int:
        """The number of this rank, from 0 on."""
        return 0 if self._group is None else dist.get_rank(self._group)

    @contextmanager
    def all_or_none(self, doing: str, numbers: int, *, maximum: bool = False) -> Iterator[Message]:
        """A step that either all ranks complete or none: whoever fails says so, where the others would wait for it.

        Args:
            doing: What, for the message.
            numbers: How many numbers each rank tells in the block; at its end it has received those of all.
            maximum: Whether only the maximum of each is wanted: many numbers of many ranks would take their time.

        Raises:
            DistributedError: On every rank, if one raised; on that one from its own error.
        """
        notes = Message()
        if self._group is None:
            yield notes
            notes.received = [list(notes.sent)]
            return
        fault: BaseException | None = None
        try:
            yield notes
        except BaseException as caught:  # also an interrupt: the others must not wait for this rank
            fault = caught
        try:
            sent = [float(fault is not None), *(notes.sent if fault is None else [0.0] * numbers)]
            received = self._exchanged(sent, maximum)
            if any(status for status, *_ in received):
                self._stop(fault, doing)
            notes.received = [rest for _, *rest in received]
        finally:
            del fault  # with its traceback it would hold this frame, and the graphs of a pose

    def _stop(self, fault: BaseException | None, doing: str) -> None:
        reasons: list[str | None] = [None] * dist.get_world_size(self._group)
        own = None if fault is None else f"{type(fault).__name__}: {fault}"
        dist.all_gather_object(reasons, own, group=self._group)
        if fault is not None and not isinstance(fault, Exception):
            raise fault
        named = [f"rank {rank} of {len(reasons)}: {reason}" for rank, reason in enumerate(reasons) if reason]
        raise DistributedError(
            f"every rank has stopped, with its model as before, since one failed in {doing}. {'; '.join(named)}"
        ) from fault

    def _exchanged(self, numbers: Sequence[float], maximum: bool) -> list[list[float]]:
        own = torch.tensor(numbers, dtype=torch.float64)
        if not maximum:
            return self._of_all(own).tolist()
        travelling = own.to(self._meeting_place(own.device))
        dist.all_reduce(travelling, dist.ReduceOp.MAX, group=self._group)
        return [travelling.tolist()]

    def _of_all(self, own: Tensor) -> Tensor:
        """`own`, of one shape on all ranks, stacked by rank on its device."""
        # As bytes: no backend knows all types.
        travelling = own.to(self._meeting_place(own.device)).contiguous().view(-1).view(torch.uint8)
        found = [torch.empty_like(travelling) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(found, travelling, group=self._group)
        return torch.stack(found).view(own.dtype).view(len(found), *own.shape).to(own.device)

    def _meeting_place(self, device: torch.device) -> torch.device:
        """Where the process group takes tensors of a device: NCCL knows no CPU, and gloo GPUs only in part."""
        backend = dist.get_backend(self._group)
        if backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device()) if device.type == "cpu" else device
        return torch.device("cpu") if backend == "gloo" else device

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, one after the other.

        Args:
            own: Those of this rank, shape `(counts[rank], ...)`.
            counts: How many each rank has.
        """
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        return torch.cat([rows[:count] for rows, count in zip(self._of_all(padded), counts, strict=True)])

    def sum_tensors(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the ranks, all of which bring the same shapes and types in the same order."""
        pending, found = deque(tensors), []
        while pending:
            bucket = [pending.popleft()]
            size = bucket[0].nbytes
            while pending and _alike(pending[0], bucket[0]) and size + pending[0].nbytes <= BUCKET_BYTES:
                size += pending[0].nbytes
                bucket.append(pending.popleft())
            found += self._summed_at_once(bucket)
        return found

    def _summed_at_once(self, bucket: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        travelling = flat.to(self._meeting_place(flat.device))
        dist.all_reduce(torch.view_as_real(travelling) if travelling.is_complex() else travelling, group=self._group)
        pieces = travelling.to(flat.device).split([tensor.numel() for tensor in bucket])
        return [piece.view_as(tensor).clone() for piece, tensor in zip(pieces, bucket, strict=True)]

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copy of a model talks to the same ranks

    def __reduce__(self) -> str | tuple[object, ...]:
        if self._group is None:
            return (Collectives, (None,))
        raise TypeError(
            "a MultiPose with a process_group cannot be pickled, since no other process has that group; save its "
            "state_dict(), or pickle its bare model (.model)"
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device

"""Collectives between the ranks of a process group, and steps that succeed on all ranks or on none."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor
from typing_extensions import Self

from gradhooks.distributed.lost_ranks import describe_lost_ranks, is_of_backend
from gradhooks.distributed.status import STEPS, Call, Status, are_together, decode
from gradhooks.errors import DistributedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Gradients are reduced in buckets of this size: no second copy of all gradients exists at any time.
BUCKET_BYTES = 32 * 2**20
Rows = list[list[float]]


@dataclass
class Message:
    """Numbers that every rank sends at the end of an all-or-none step.

    Attributes:
        sent: Numbers of this rank, set inside the step: at most `status.LENGTH`.
        received: Numbers of all ranks in rank order, set at the end of the step; zeros follow those that were sent.
    """

    sent: Sequence[float] = ()
    received: list[list[float]] = field(default_factory=list)


class Collectives:
    """Run collectives on a process group. Without a group every operation is local and free, as is creating one.

    Args:
        process_group: The group, a one-dimensional `DeviceMesh`, or None for a single process.
        call: The call for which collectives are run. All ranks must be at the same step of the same call.

    Raises:
        DistributedError: This process is not a member of the group.
    """

    def __init__(self, process_group: "dist.ProcessGroup | DeviceMesh | None", call: Call | None = None) -> None:
        self.call = Call() if call is None else call
        self._where = "in a collective"
        source: Any = process_group
        self._group: dist.ProcessGroup | None = source.get_group() if hasattr(source, "get_group") else source
        self._rank = 0 if self._group is None else dist.get_rank(self._group)
        if self._rank < 0:
            raise DistributedError(
                "process_group does not contain this process; pass each process a group that contains it, for example "
                "mesh['poses'] of a DeviceMesh"
            )

    @property
    def is_single(self) -> bool:
        """Whether there is no process group."""
        return self._group is None

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """The process group."""
        return self._group

    @property
    def rank(self) -> int:
        """Rank of this process in the group, 0 without a group."""
        return self._rank

    @contextmanager
    def all_or_none(self, step: str) -> Iterator[Message]:
        """Run a block that succeeds on all ranks or on none: if one raises, every rank raises at the end of its block.

        Args:
            step: One of `status.STEPS`, also for the error message.

        Yields:
            The message. `received` is set when the block ends.

        Raises:
            DistributedError: A rank raised, is at another step, or is gone. On a rank that raised, its own error is the
                cause.
        """
        message = Message()
        if self._group is None:
            yield message
            message.received = [list(message.sent)]
            return
        self._where = f"in the {step} of {self.call}"
        fault: BaseException | None = None
        try:
            yield message
        except BaseException as caught:  # includes KeyboardInterrupt: the other ranks must not wait for this one
            fault = caught
        try:
            message.received = self._exchange(step, message, fault)
        except DistributedError as error:
            if fault is None or error.__cause__ is fault:
                raise
            if not isinstance(fault, Exception):
                raise fault from error
            raise DistributedError(f"{type(fault).__name__}: {fault}. Besides, {error}") from fault
        finally:
            del fault  # its traceback refers to this frame: the cycle would keep the graph of a pose alive

    def _exchange(self, step: str, message: Message, fault: BaseException | None) -> Rows:
        status = Status(fault is not None, STEPS.index(step), self.call, () if fault is not None else message.sent)
        with self.naming_lost_ranks():
            failed, received = self._exchange_status(status)
            if failed:
                self._raise_everywhere(fault, step)
        return received

    def _raise_everywhere(self, fault: BaseException | None, step: str) -> None:
        reasons = self.gather_objects(None if fault is None else f"{type(fault).__name__}: {fault}")
        failed = "; ".join(f"rank {rank} of {len(reasons)}: {text}" for rank, text in enumerate(reasons) if text)
        logger.debug("stopping all ranks, the {} failed: {}", step, failed)
        if fault is not None and not isinstance(fault, Exception):
            raise fault
        raise DistributedError(
            f"a rank failed in the {step}, so all ranks stopped, with their models as before. Fix the cause and run "
            f"the step again on all ranks. {failed}"
        ) from fault

    def _exchange_status(self, status: Status) -> tuple[bool, Rows]:
        """Return whether a rank has failed, and the numbers of all ranks."""
        local = torch.tensor(status.encode(), dtype=torch.float64)
        statuses = [decode(row) for row in self._gather(local).tolist()]
        failed = any(status.failed for status in statuses)
        if not (failed or are_together(statuses)):
            described = "; ".join(f"rank {rank} is {status}" for rank, status in enumerate(statuses))
            raise DistributedError(
                f"ranks of a process group are at different steps, so all ranks stopped: {described}. Call the same "
                "scorers, and their backwards, in the same order on all ranks; scorers are numbered as they were made "
                "with the group. If one rank raised before a backward, all ranks must leave out that backward"
            )
        self.call = Call(self.call.scorer, max(status.call.batch for status in statuses))
        return failed, [list(status.numbers) for status in statuses]

    def maximum_of_bytes(self, values: Sequence[int]) -> list[int]:
        """Return the elementwise maximum over ranks of integers from 0 to 255."""
        local = torch.tensor(values, dtype=torch.uint8)
        buffer = local.to(self._communication_device(local.device))
        with self.naming_lost_ranks():
            dist.all_reduce(buffer, dist.ReduceOp.MAX, group=self._group)
        highest: list[int] = buffer.tolist()
        return highest

    def gather_objects(self, value: Any) -> list[Any]:
        """Return an object of each rank, in rank order; for messages, since it is slow."""
        gathered: list[Any] = [None] * dist.get_world_size(self._group)
        with self.naming_lost_ranks():
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    @contextmanager
    def naming_lost_ranks(self, *, runs_model: bool = False) -> Iterator[None]:
        """Turn an error of the backend in the block into one that names the ranks that do not answer.

        Args:
            runs_model: Whether the block may raise errors of a model too. They are told apart by their messages.
        """
        try:
            yield
        except (DistributedError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            if self._group is None or (runs_model and not is_of_backend(error)):
                raise
            raise DistributedError(describe_lost_ranks(self._group, self._where, error)) from error

    def _gather(self, local: Tensor) -> Tensor:
        """Stack `local`, of the same shape on all ranks, in rank order on its device."""
        # As bytes: no backend supports all dtypes.
        buffer = local.to(self._communication_device(local.device)).contiguous().view(-1).view(torch.uint8)
        gathered = [torch.empty_like(buffer) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(gathered, buffer, group=self._group)
        return torch.stack(gathered).view(local.dtype).view(len(gathered), *local.shape).to(local.device)

    def _communication_device(self, device: torch.device) -> torch.device:
        """Return the device on which the backend communicates tensors of `device`.

        NCCL supports no CPU tensors; gloo supports GPU tensors in some collectives only.
        """
        backend = dist.get_backend(self._group)
        if backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device()) if device.type == "cpu" else device
        return torch.device("cpu") if backend == "gloo" else device

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate the rows of all ranks in rank order.

        Args:
            rows: Rows of this rank, shape `(counts[rank], ...)`.
            counts: Number of rows of each rank.
        """
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        with self.naming_lost_ranks():
            gathered = self._gather(padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def sum_tensors(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Sum each tensor over the ranks. All ranks pass the same shapes and dtypes in the same order."""
        pending, sums = deque(tensors), []
        while pending:
            bucket = [pending.popleft()]
            size = bucket[0].nbytes
            while pending and _fits_bucket(pending[0], bucket[0]) and size + pending[0].nbytes <= BUCKET_BYTES:
                size += pending[0].nbytes
                bucket.append(pending.popleft())
            with self.naming_lost_ranks():
                sums += self._sum_bucket(bucket)
        return sums

    def _sum_bucket(self, bucket: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        buffer = flat.to(self._communication_device(flat.device))
        dist.all_reduce(torch.view_as_real(buffer) if buffer.is_complex() else buffer, group=self._group)
        pieces = buffer.to(flat.device).split([tensor.numel() for tensor in bucket])
        return [piece.view_as(tensor).clone() for piece, tensor in zip(pieces, bucket, strict=True)]

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> str | tuple[object, ...]:
        if self._group is None:
            return (Collectives, (None,))
        raise TypeError(
            "cannot pickle a MultiPose with a process_group: a process group exists in its own process only. Save "
            "state_dict(), or pickle the bare model (.model)"
        )


def _fits_bucket(tensor: Tensor, first: Tensor) -> bool:
    return tensor.dtype == first.dtype and tensor.device == first.device

"""What the ranks of a process group must have in common, compared in every batch.

Rules:
    1. The digests of everything that is compared travel with the numbers of poses, so nothing is sent for them alone.
       Only where they differ, the ranks exchange descriptions, to name what differs first.
    2. The values of parameters are compared to the bit in the first batch, and where ranks have replaced, frozen or
       unfrozen parameters. In the other batches their norms are compared, above rounding: machines of different kinds
       may drift apart by rounding. The coefficients are compared in each backward.
    3. Buffers may differ: each rank has poses of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.parameter_description import (
    describe_parameter,
    describe_values,
    norms,
    trained_numbers,
    value_hashes,
)
from gradhooks.distributed.status import Call, digest
from gradhooks.distributed.subject import Subject
from gradhooks.errors import DistributedError

_DRIFT = 1e-5
"""Rule 2: relative difference of norms."""

_LENGTH = 4
"""Numbers of a summary."""

_scorers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class Agreement:
    """Compares the ranks of one scorer's process group. Without a group it does nothing.

    A copy of a scorer has the number of the original, so that one rank alone may make a copy.
    """

    def __init__(self, number: int = 0) -> None:
        self._number = number
        self._batch = 0
        self._group: Any = None
        self._known: list[Any] = []
        self._trained: list[Tensor] = []
        self._structure = 0.0

    def join(self, process_group: Any) -> None:
        """Count this scorer among those of a process group, which may be a `DeviceMesh` or None."""
        group = process_group.get_group() if hasattr(process_group, "get_group") else process_group
        if group is not None and group is not self._group:
            self._number = _scorers[group] = _scorers.get(group, 0) + 1
        self._group = group

    @property
    def call(self) -> Call:
        """The next call."""
        return Call(self._number, self._batch)

    def summary(self, subject: Subject) -> list[float]:
        """Return the numbers that are compared, for the status of the first step; none without a group."""
        if self._group is None:
            return []
        named = subject.parameters()
        values = 0.0  # compared only in batches in which several ranks have computed it
        identities = [(id(each), each.requires_grad, _memory(each)) for _, each in named]
        if identities != self._known:
            self._structure = digest(repr([describe_parameter(*each) for each in named]).encode())
            values = digest(repr(value_hashes(named)).encode())
            self._trained = trained_numbers(named)
            self._known = identities
        norm_sum = sum((1 + index) * norm for index, norm in enumerate(norms(self._trained)))
        return [norm_sum, self._structure, subject.settings_digest(), values]

    def confirm(
        self, collectives: Collectives, received: Sequence[Sequence[float]], subject: Subject
    ) -> list[Sequence[float]]:
        """Refuse ranks that differ, and agree on the number of the batch.

        Args:
            collectives: The ranks.
            received: What each rank has sent, its summary first.
            subject: What is compared.

        Returns:
            What follows the summaries.

        Raises:
            DistributedError: It names the ranks and what differs first.
        """
        if collectives.is_single:
            return list(received)
        self._batch = collectives.call.batch + 1
        norm_sums, *digests, values = zip(*(row[:_LENGTH] for row in received), strict=True)
        drifted = not max(norm_sums) - min(norm_sums) <= _DRIFT * max(map(abs, norm_sums))
        if all(len(set(each)) == 1 for each in digests) and len({*values} - {0.0}) <= 1 and not drifted:
            return [row[_LENGTH:] for row in received]
        self._known = []  # compare values to the bit after an error
        named = subject.parameters()
        description = {**subject.describe_settings(), **dict(describe_parameter(*each) for each in named)}
        description |= describe_values(named)
        raise DistributedError(_first_difference(collectives.gather_objects(description)))

    def __deepcopy__(self, memo: object) -> "Agreement":
        copied = Agreement(self._number)
        copied._group = self._group
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return (Agreement, ())


def _memory(parameter: Tensor) -> int:
    return parameter.data_ptr() if type(parameter) is nn.Parameter else 0  # others may have none


def _first_difference(descriptions: Sequence[Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(name for each in descriptions for name in each))
    for name in names:
        found = [each.get(name, "does not exist") for each in descriptions]
        if len(set(found)) > 1:
            by_value: dict[str, list[int]] = {}
            for rank, value in enumerate(found):
                by_value.setdefault(value, []).append(rank)
            listed = "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in by_value.items())
            return (
                f"the ranks of a process group must have the same model, combination and options, and differ in "
                f"{name}. {listed}. All ranks stopped before the model ran. Make them alike: set the same seed before "
                "a model is made, load the same checkpoint, or send rank 0's with torch.distributed.broadcast"
            )
    return "the ranks of a process group differ in their parameters, but no longer while the difference was described"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

"""What the ranks that share poses, or shards of parameters, must have in common, compared in every batch.

Rules:
    1. The digests of everything that is compared travel with the numbers of poses, so nothing is sent for them alone.
       Only where they differ, the ranks exchange descriptions, to name what differs first.
    2. The values of parameters are compared to the bit in the first batch, and where ranks have replaced, frozen or
       unfrozen parameters. In the other batches their norms are compared, above rounding: machines of different kinds
       may drift apart by rounding. Of a large model it is the norms of some parameters, in turn, which takes some ten
       microseconds. The coefficients are compared in each backward.
    3. Buffers may differ: each rank has poses of its own.
    4. Ranks that share shards have groups of their own, so only what decides which collectives run is compared: names,
       shapes, dtypes, trainability of parameters, and grad mode. No rank has the values of the others' shards.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor

from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.parameter_description import (
    describe_parameter,
    describe_values,
    norms,
    trained_numbers,
    value_hashes,
)
from gradhooks.distributed.sharded_model import ShardedModel
from gradhooks.distributed.status import Call, digest
from gradhooks.distributed.subject import Subject
from gradhooks.errors import DistributedError

_DRIFT = 1e-5
"""Rule 2: relative difference of norms."""

_NORMS = 8
"""Rule 2: how many parameters have their norms compared in a batch."""

_LENGTH = 4
"""Numbers of a summary."""

_scorers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class Agreement:
    """Compares the ranks of one scorer's process group. Without a group it does nothing.

    A copy of a scorer has the number of the original, so that one rank alone may make a copy.
    """

    def __init__(self) -> None:
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._batch = 0
        self._group: Any = None
        self._known: tuple[object, ...] = ()
        self._version: object = None  # keeps the ids in `_known` valid
        self._trained: list[Tensor] = []
        self._structure = 0.0
        self._settings_key: tuple[object, ...] = ()
        self._settings = 0.0

    def join(self, process_group: Any) -> None:
        """Count this scorer among those of a process group, which may be a `DeviceMesh` or None."""
        group = process_group.get_group() if hasattr(process_group, "get_group") else process_group
        if group is not None and group not in self._numbers:
            self._numbers[group] = _scorers[group] = _scorers.get(group, 0) + 1
        self._group = group

    @property
    def call(self) -> Call:
        """The next call."""
        return Call(0 if self._group is None else self._numbers[self._group], self._batch)

    def summary(self, subject: Subject) -> list[float]:
        """Return the numbers that are compared, for the status of the first step; none without a group."""
        if self._group is None:
            return []
        values = 0.0  # compared only in batches in which several ranks have computed it
        if changed := self._notice_changes(subject):
            values = digest(repr(value_hashes(changed)).encode())
            self._trained = trained_numbers(changed)
        first = self._batch * _NORMS % len(self._trained) if len(self._trained) > _NORMS else 0
        sizes = norms(self._trained[first : first + _NORMS])
        norm_sum = sum((1 + index) * size for index, size in enumerate(sizes))
        return [norm_sum, self._structure, self._digest_settings(subject.settings_key()), values]

    def summary_of_shards(self, subject: Subject) -> list[float]:
        """Return the numbers whose maximum over ranks `confirm_shards` needs (rule 4)."""
        self._notice_changes(subject)
        settings = self._digest_settings(tuple(subject.settings.values()))
        return [self._structure, -self._structure, settings, -settings, self._batch]

    def _notice_changes(self, subject: Subject) -> Sequence[tuple[str, Tensor]]:
        """Return all parameters if some were replaced, frozen or unfrozen, and digest what they are then."""
        key = subject.key
        if key == self._known:
            return []
        named = subject.parameters()
        self._structure = digest(repr([describe_parameter(*each) for each in named]).encode())
        self._known, self._version = key, subject.version
        return named

    def _digest_settings(self, key: tuple[object, ...]) -> float:
        if key != self._settings_key:
            self._settings_key, self._settings = key, digest(repr(key).encode())
        return self._settings

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
        self._known = ()  # compare values to the bit after an error
        named = subject.parameters()
        description = {**subject.describe_settings(), **dict(describe_parameter(*each) for each in named)}
        description |= describe_values(named)
        raise DistributedError(_first_difference(enumerate(collectives.gather_objects(description))))

    def confirm_shards(self, sharded: ShardedModel, highest: Sequence[float], subject: Subject) -> Sequence[float]:
        """Refuse ranks that share shards and differ, and agree on the number of the batch.

        Args:
            sharded: The ranks.
            highest: The maximum over ranks of what each has sent, `summary_of_shards` first.
            subject: What is compared.

        Returns:
            What follows the summary.

        Raises:
            DistributedError: It names the ranks and what differs first.
        """
        structure, other_structure, settings, other_settings, batch, *rest = highest
        self._batch = int(batch) + 1
        sharded.call = Call(sharded.call.scorer, int(batch))
        if structure == -other_structure and settings == -other_settings:
            return rest
        self._known = ()
        named = dict(describe_parameter(*each) for each in subject.parameters())
        described = {name: str(value) for name, value in subject.settings.items()} | named
        raise DistributedError(_first_difference(sharded.gather_objects(described)))

    def __deepcopy__(self, memo: object) -> "Agreement":
        copied = Agreement()
        copied._numbers, copied._group = WeakKeyDictionary(self._numbers), self._group
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return (Agreement, ())


@dataclass
class Beginning:
    """What each rank says when a batch begins, and what it learns.

    Attributes:
        counts: What this rank tells the others.
        subject: What is compared.
        audit_is_due: Whether this rank has not audited the model yet; after the block, whether any rank has not.
        of_all_ranks: The counts of each rank, in rank order, after the block.
    """

    counts: Sequence[float] = ()
    subject: Subject | None = None
    audit_is_due: bool = False
    of_all_ranks: Sequence[Sequence[float]] = ()


@contextmanager
def begin_batch(agreement: Agreement, collectives: Collectives, sharded: ShardedModel) -> Iterator[Beginning]:
    """Run a block that succeeds on all ranks or on none, and compare the ranks at its end. A single process is free.

    Args:
        agreement: The agreement of this scorer.
        collectives: The ranks that share poses.
        sharded: The ranks that share shards.

    Yields:
        What this rank tells the others, to be set in the block.

    Raises:
        DistributedError: A rank raised, differs, is at another step, or is gone.
    """
    beginning = Beginning()
    if collectives.is_single and not sharded:
        yield beginning
        beginning.of_all_ranks = [beginning.counts]
        return
    if sharded:
        agreement.join(sharded.group)
        sharded.call = agreement.call
    step = "reading of the poses"
    with sharded.all_or_none(step) as of_shards, collectives.all_or_none(step) as of_group:
        yield beginning
        subject = cast("Subject", beginning.subject)
        due = float(beginning.audit_is_due)
        if sharded:
            of_shards.sent = [*agreement.summary_of_shards(subject), due]
            of_group.sent = [due, *beginning.counts]
        else:
            of_group.sent = [*agreement.summary(subject), due, *beginning.counts]
    if sharded:
        due = agreement.confirm_shards(sharded, of_shards.received[0], subject)[0]
    rows = agreement.confirm(collectives, of_group.received, subject)
    beginning.audit_is_due = due > 0 or any(row[0] for row in rows)
    beginning.of_all_ranks = [row[1:] for row in rows]


def _first_difference(descriptions: Iterable[tuple[int, Mapping[str, str]]]) -> str:
    by_rank = dict(descriptions)
    for name in dict.fromkeys(name for each in by_rank.values() for name in each):
        by_value: dict[str, list[int]] = {}
        for rank, each in by_rank.items():
            by_value.setdefault(each.get(name, "does not exist"), []).append(rank)
        if len(by_value) > 1:
            listed = "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in by_value.items())
            return (
                f"the ranks of a process group must have the same model, combination and options, and differ in "
                f"{name}. {listed}. All ranks stopped before the model ran. Make them alike: set the same seed before "
                "a model is made, load the same checkpoint, or send rank 0's with torch.distributed.broadcast"
            )
    return "the ranks of a process group differ in their parameters, but no longer while the difference was described"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

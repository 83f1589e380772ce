"""What the ranks of a process group must have in common, compared in every batch.

Rules:
    1. The digests of everything that is compared travel with the numbers of poses, so nothing is sent for them alone.
       Only where they differ, the ranks exchange descriptions, to name what differs first.
    2. The values of parameters are compared to the bit in the first batch, and after a parameter was replaced, frozen
       or unfrozen. In the other batches their norms are compared, above rounding: machines of different kinds may drift
       apart by rounding. The coefficients are compared in each backward.
    3. Buffers may differ: each rank has poses of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from gradhooks.distributed.collectives import Collectives
from gradhooks.distributed.description import (
    describe_function,
    describe_parameter,
    describe_values,
    has_values,
    norms,
    value_hashes,
)
from gradhooks.distributed.status import Call, digest
from gradhooks.errors import DistributedError

_DRIFT = 1e-5
"""Rule 2: relative difference of norms."""

_scorers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        model: The bare model.
        combination: The combination.
        settings: Options and modes of the call, by name.
    """

    model: nn.Module
    combination: Any
    settings: Mapping[str, object]

    def parameters(self) -> list[tuple[str, Tensor]]:
        """Return the parameters of the model and of the combination with their names."""
        named: list[tuple[str, Tensor]] = list(self.model.named_parameters())
        if isinstance(self.combination, nn.Module):
            named += self.combination.named_parameters("combination")
        return named

    def describe_settings(self) -> dict[str, str]:
        """Return what may differ from call to call."""
        modes = {f"the mode of module {path!r}": _mode(each) for path, each in self.model.named_modules()}
        settings = {name: str(value) for name, value in self.settings.items()}
        return {**settings, "the combination": describe_function(self.combination), **modes}

    def settings_digest(self) -> float:
        """Return a digest of `describe_settings`, without the paths of modules, which take time to find."""
        flags = bytes(module.training for module in self.model.modules())
        return digest(repr([*self.settings.values(), describe_function(self.combination), flags]).encode())


class Agreement:
    """Compares the ranks of one scorer's process group. Without a group it does nothing.

    A copy of a scorer has the number of the original, so that one rank alone may make a copy.
    """

    def __init__(self, number: int = 0) -> None:
        self._number = number
        self._batch = 0
        self._group: Any = None
        self._known: list[Any] = []
        self._structure = self._values = 0.0

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
        """Return the numbers that are compared, for the status of the first step."""
        named = subject.parameters()
        identities = [
            (name, id(each), each.requires_grad, has_values(each) and (each.data_ptr(), each.shape))
            for name, each in named
        ]
        if identities != self._known:
            self._structure = digest(repr([describe_parameter(*each) for each in named]).encode())
            self._values = digest(repr(value_hashes(named)).encode())
            self._known = identities
        norm_sum = sum((1 + index) * norm for index, norm in enumerate(norms(named)))
        return [self._structure, subject.settings_digest(), self._values, norm_sum]

    def confirm(self, collectives: Collectives, summaries: Sequence[Sequence[float]], subject: Subject) -> None:
        """Refuse ranks that differ, and agree on the number of the batch.

        Args:
            collectives: The ranks.
            summaries: The summary of each rank.
            subject: What is compared.

        Raises:
            DistributedError: It names the ranks and what differs first.
        """
        self._batch = collectives.call.batch + 1
        *digests, norm_sums = zip(*summaries, strict=True)
        largest = max(map(abs, norm_sums))
        drifted = not max(norm_sums) - min(norm_sums) <= _DRIFT * largest
        if all(len(set(each)) == 1 for each in digests) and not drifted:
            return
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


def _mode(module: nn.Module) -> str:
    return "training" if module.training else "evaluation"


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

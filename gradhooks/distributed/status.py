"""Status: the numbers that every rank sends at the end of a step, of one size for every step.

So ranks at different steps understand each other and raise, where a backend would abort or mix up their data.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = ("reading of the poses", "audit", "forward", "backward")
LENGTH = 8
"""How many numbers a step may add to its status."""
LIMIT = 2**26
"""Two numbers below it fit into one float64."""


@dataclass(frozen=True)
class Call:
    """One call of one scorer.

    Attributes:
        scorer: The number of the scorer among those of this process group, in the order in which they were made.
        batch: How many calls of this scorer came before.
    """

    scorer: int = 0
    batch: int = 0

    def __str__(self) -> str:
        return f"batch {self.batch} of scorer {self.scorer}"


@dataclass(frozen=True)
class Status:
    """What one rank sends.

    Attributes:
        failed: Whether it raised.
        step: The index of its step in `STEPS`.
        call: The call that it works on.
        numbers: What the step sends.
    """

    failed: bool
    step: int
    call: Call
    numbers: Sequence[float]

    def encode(self) -> list[float]:
        """Return `LENGTH + 2` numbers."""
        position = [pack(self.step, int(self.failed)), pack(self.call.scorer % LIMIT, self.call.batch % LIMIT)]
        return [*position, *self.numbers, *[0.0] * (LENGTH - len(self.numbers))]

    def __str__(self) -> str:
        return f"in the {STEPS[self.step]} of {self.call}"


def decode(encoded: Sequence[float]) -> Status:
    """Return the status that a rank has encoded."""
    step, failed = unpack(encoded[0])
    return Status(bool(failed), step, Call(*unpack(encoded[1])), encoded[2:])


def pack(high: int, low: int) -> float:
    """Return one number for two that are below `LIMIT`; it has room for both exactly."""
    return float(high * LIMIT + low)


def unpack(number: float) -> tuple[int, int]:
    """Return the two numbers."""
    high, low = divmod(int(number), LIMIT)
    return high, low


def are_together(statuses: Sequence[Status]) -> bool:
    """Return whether all ranks are at the same step of the same call.

    While poses are read, ranks agree on the number of the batch, so that they can go on together after an error.
    """
    reading = statuses[0].step == 0
    return len({(each.step, each.call.scorer, reading or each.call.batch) for each in statuses}) == 1


def digest(content: bytes) -> float:
    """Return a number that differs, but for one case in 2**48, if the content does."""
    return float(int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big"))

"""BatchPlan: how the poses of a batch run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """How the poses of a batch run.

    Attributes:
        allowed: The bytes that the option `memory` stands for.
        plain: The number of poses that run plainly.
        intercepted: The number of the others.
        plain_chunk_size: The number of plain poses that run together.
        chunks: In how many chunks all poses run the first time.
        chunk_size: The number of intercepted poses that run together.
        accumulator: The accumulator of the intercepted poses.
        reason: Why this accumulator.
        gradient_copies: How many copies of the gradients the accumulator keeps while poses run.
    """

    allowed: int
    plain: int
    intercepted: int
    plain_chunk_size: int
    chunks: int
    chunk_size: int
    accumulator: str
    reason: str
    gradient_copies: int

    @property
    def rerun_share(self) -> float:
        """The share of poses that run a second time if all of them matter."""
        one_run = self.accumulator in ("stream", "store")
        return 0.0 if one_run else self.intercepted / (self.plain + self.intercepted)

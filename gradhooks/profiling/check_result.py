"""GradientCheck: what `gradcheck` found, as a table that says what differs, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradhooks.errors import GradhooksError, ReplayError
from gradhooks.profiling.result_table import ResultTable, TableContent

SHOWN = 4  # differences that a note names


@dataclass(frozen=True)
class CheckedAccumulator:
    """How one accumulator compares with the full graph.

    Attributes:
        name: Its name, or the given or default memory.
        gradient_error: Largest error of a gradient, see `gradient_errors`; infinite if the accumulator raised an error.
        differences: What differs from the full graph, and in which step.
        error: The error that it raised, or None.
        detached: Attributes that have a graph in the full graph, and none here. A loss that uses them has to be passed
            to `gradcheck`.
    """

    name: str
    gradient_error: float
    differences: tuple[str, ...] = ()
    error: Exception | None = None
    detached: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it ran, and nothing differs."""
        return self.error is None and not self.differences

    @property
    def verdict(self) -> str:
        """`ok`; `WRONG`; `refused` with an error of gradhooks, or `failed` with any other one."""
        if self.error is None:
            return "WRONG" if self.differences else "ok"
        return "refused" if isinstance(self.error, GradhooksError) else "failed"

    @property
    def finding(self) -> str:
        """What is wrong; empty if nothing is."""
        if self.error is not None:
            kind = "" if isinstance(self.error, GradhooksError) else f"{type(self.error).__name__}: "
            return f"{self.verdict}: {kind}{self.error}"
        shown = "; ".join(self.differences[:SHOWN])
        more = len(self.differences) - SHOWN
        return f"{shown}; and {more} more" if more > 0 else shown


@dataclass(frozen=True)
class GradientCheck(ResultTable):
    """The result of `gradcheck`; prints as a table.

    Attributes:
        rows: One for each accumulator with `memory=0`, so that all poses are intercepted, and one with the given or
            default memory, so that poses run plainly where they fit.
        unused_parameters: Parameters that require grad and get no gradient from any pose, also in the full graph.
        reason: Why nothing could be compared; None if it could.
        notes: How the comparison was made, where that is not as usual.
    """

    rows: tuple[CheckedAccumulator, ...]
    unused_parameters: tuple[str, ...] = ()
    reason: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether gradients were compared, and every row agrees with the full graph."""
        return self.reason is None and all(row.passed for row in self.rows)

    @property
    def errors(self) -> dict[str, float]:
        """The largest error of a gradient, by row."""
        return {row.name: row.gradient_error for row in self.rows}

    @property
    def second_run_agrees(self) -> bool:
        """Whether a second run of every pose gives the prediction of the first."""
        return not any(isinstance(row.error, ReplayError) for row in self.rows)

    def table_content(self) -> TableContent:
        """Return one row per accumulator, and notes on what differs and what to do."""
        rows = [[row.name, f"{row.gradient_error:.1e}", row.verdict] for row in self.rows]
        return TableContent(["accumulator", "gradient error", "verdict"], rows, list(self._notes()))

    def _notes(self) -> Sequence[str]:
        notes = [] if self.reason is None else [f"NOT CHECKED: {self.reason}"]
        findings: dict[str, list[str]] = {}
        for row in self.rows:
            if row.finding:
                findings.setdefault(row.finding, []).append(row.name)
        notes += [f"{', '.join(names)}: {finding}" for finding, names in findings.items()]
        notes += _remedies(self.rows)
        detached = dict.fromkeys(name for row in self.rows for name in row.detached)
        if detached:
            rows = ", ".join(row.name for row in self.rows if row.detached)
            notes.append(
                f"{', '.join(detached)}: has a graph in the full graph, and none with {rows}. If your loss uses it, "
                "pass the loss: loss=lambda prediction, model: ..."
            )
        if not self.second_run_agrees:
            notes.append("a second run of a pose gives ANOTHER prediction")
        if self.unused_parameters:
            notes.append(f"no prediction depends on {', '.join(self.unused_parameters)}")
        return [*notes, *self.notes]


def _remedies(rows: Sequence[CheckedAccumulator]) -> list[str]:
    """Return what to do about the differences, for each kind of them."""
    differences = [text for row in rows for text in row.differences]
    good = [row.name for row in rows if row.passed]
    instead = f", or use what is ok here: {', '.join(good)}" if good else ""
    remedies = []
    if any(text.startswith(("gradient", ".grad")) for text in differences):
        remedies.append(
            "gradients: memory= that holds the whole batch trains as plain PyTorch; with less, a forward must be "
            "repeatable and its backward linear: keep what it remembers in attributes of modules, and what else the "
            f"loss uses in the prediction{instead}"
        )
    if any("outside the model" in text for text in differences):
        remedies.append("leaves outside the model: pass them as part of the pose")
    if any(text.startswith("the generator") for text in differences):
        remedies.append("generators: name those that are no attributes of modules with generators=[...]")
    if any(text.startswith(("buffer", "attribute", "parameter")) for text in differences):
        remedies.append(
            "contents: what a forward changes must be in a buffer or in an attribute of a module (numbers, tensors, "
            "containers of them), so that a second run finds and leaves it as it was; what has a graph must be part of "
            f"the prediction{instead}"
        )
    return remedies

"""promises: what gradhooks promises of time and memory, measured on the reference models."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.trials import Bench, Found, Trial
from gradhooks.accumulators import Recompute
from gradhooks.combinations import Boltzmann, Mean, Min
from gradhooks.profiling.table import table
from gradhooks.profiling.timing import ratio

# Of N predictions, what each may need of every table in which it stands.
BYTES_PER_PREDICTION = 128


class Promise(NamedTuple):
    """One promise, and what was found.

    Attributes:
        model: On which model.
        promise: What is compared with what.
        measured: The ratio.
        bound: What it must not exceed.
    """

    model: str
    promise: str
    measured: float
    bound: float

    @property
    def met(self) -> bool:
        return self.measured <= self.bound


def promises(
    names: Sequence[str], poses: int, many: int, repeats: int, device: torch.device | str = "cpu"
) -> Iterator[Promise]:
    """Measure what is promised, on reference models; numbers too small for a normalised float count as zero.

    Args:
        names: Of reference models.
        poses: N.
        many: N of a long group.
        repeats: Rounds that count.
        device: Where to run.
    """
    flushing = torch.set_flush_denormal(True)
    try:
        for name in names:
            bench = Bench(name, poses, many, repeats, device)
            for measure in (_nothing_to_skip, _two_sums, _sharp, _long):
                for promise, measured, bound in measure(bench):
                    yield Promise(name, promise, measured, bound)
    finally:
        torch.set_flush_denormal(not flushing)


Measured = Iterator[tuple[str, float, float]]


def _nothing_to_skip(bench: Bench) -> Measured:
    step = bench.step_peak(bench.poses)
    retaining = Recompute(retain="64GiB")
    for title, combination in (("mean", Mean()), ("min, scale 1", Min(1 / bench.spread))):
        ways = ("full graph", "checkpoint per pose", "stream", "recompute", retaining, "auto")
        found = bench.together(combination, *ways)
        full, plain = found["full graph"], found["plain steps"]
        yield f"{title}: stream / full graph, time", ratio(found["stream"].seconds, full.seconds), 1.03
        yield f"{title}: stream / N plain steps, time", ratio(found["stream"].seconds, plain.seconds), 1.05
        yield f"{title}: stream / a plain step, peak", found["stream"].peak / step, 1.02
        checkpointed = found["checkpoint per pose"].seconds
        yield f"{title}: recompute / checkpoint, time", ratio(found["recompute"].seconds, checkpointed), 0.95
        yield f"{title}: recompute / a plain step, peak", found["recompute"].peak / step, 1.02
        retained = found[str(retaining)]
        yield f"{title}: recompute with enough retain / full graph, time", ratio(retained.seconds, full.seconds), 1.03
        yield _auto(title, found)


def _two_sums(bench: Bench) -> Measured:
    found = bench.together(Boltzmann(bench.spread), "full graph", "stream", "recompute", "auto")
    stream, room = found["stream"], 1.02 * bench.step_peak(bench.poses) + bench.gradient_bytes()
    yield "boltzmann: stream / full graph, time", ratio(stream.seconds, found["full graph"].seconds), 1.08
    yield "boltzmann: stream / (1.02 plain step + one gradient), peak", stream.peak / room, 1.0
    yield _auto("boltzmann", found)


def _sharp(bench: Bench) -> Measured:
    more = max(1, bench.many // 4)
    sharp, level = Min(1000 / bench.spread), Min(1 / bench.spread)
    for poses in (bench.poses, more):
        trials = {name: Trial(name, sharp, poses) for name in ("stream", "recompute", "auto")}
        found = bench.found({"level": Trial("full graph", level, bench.poses), **trials})
        title = f"min, scale 1000, N = {poses}"
        per_pose = bench.poses / poses
        at_scale_one = ratio(found["auto"].seconds, found["level"].seconds) * per_pose
        yield f"{title}: auto / full graph at scale 1, time of a pose", at_scale_one, 0.40
        yield f"{title}: auto / floor, time", _to_floor(found, poses, bench.poses), 1.15
        yield f"{title}: auto / a plain step, peak", found["auto"].peak / bench.step_peak(poses), 1.02
        yield _auto(title, found)


def _long(bench: Bench) -> Measured:
    found = bench.found({str(poses): Trial("auto", Mean(), poses) for poses in (bench.poses, bench.many)})
    few, many = found[str(bench.poses)], found[str(bench.many)]
    title = f"mean: auto, N = {bench.many} / N = {bench.poses}"
    yield f"{title}, time of a pose", ratio(many.seconds, few.seconds) * bench.poses / bench.many, 1.05
    tables = BYTES_PER_PREDICTION * (bench.many - bench.poses)
    yield f"{title}, peak less {BYTES_PER_PREDICTION} bytes a pose", (many.peak - tables) / few.peak, 1.01


def _auto(title: str, found: dict[str, Found]) -> tuple[str, float, float]:
    to_others = [ratio(found["auto"].seconds, found[name].seconds) for name in ("stream", "recompute")]
    return f"{title}: auto / best accumulator, time", max(to_others), 1.05


def _to_floor(found: dict[str, Found], poses: int, measured: int) -> float:
    """Time of `auto` relative to (N - k) F + k S, with F and S from so many `measured` plain forwards and steps."""
    matter = found["recompute"].backwards
    floors = [
        ((poses - matter) * forward + matter * step) / measured
        for forward, step in zip(found["forwards"].seconds, found["plain steps"].seconds, strict=True)
    ]
    return ratio(found["auto"].seconds, floors)


def as_table(kept: Sequence[Promise]) -> str:
    """Promises by row, models by column; what is not met is marked."""
    models = list(dict.fromkeys(promise.model for promise in kept))
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for promise in kept:
        cells = rows.setdefault((promise.promise, promise.bound), {})
        cells[promise.model] = f"{promise.measured:.3f}{'' if promise.met else ' NOT MET'}"
    lines = [
        [title, f"{bound:.2f}", *(cells.get(model, "") for model in models)] for (title, bound), cells in rows.items()
    ]
    return table(["promise", "at most", *models], lines)


def save(kept: Sequence[Promise], path: str | Path) -> None:
    """Write them as JSON."""
    Path(path).write_text(json.dumps([{**promise._asdict(), "met": promise.met} for promise in kept], indent=2) + "\n")

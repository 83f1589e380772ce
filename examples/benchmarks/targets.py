"""Measure the project's targets of time and memory on the reference models, and whether each is met."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from command_line import flushed_denormals, markdown_table, model_parser, parse_models, save
from trials import Measurement, Trial, TrialRunner

from gradhooks.combinations import Boltzmann, Mean, Min
from gradhooks.profiling.timing import median_ratio

# Bookkeeping allowed per prediction: the predictions, coefficients and weights of a pose, in a few tensors each.
BYTES_PER_PREDICTION = 128
KEPT_GRAPHS = "auto, memory=64GiB"


class Target(NamedTuple):
    """One target and its measurement.

    Attributes:
        model: The reference model.
        quantity: What is compared with what.
        measured: The ratio.
        limit: The largest ratio that meets the target.
    """

    model: str
    quantity: str
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the measured ratio is within the limit."""
        return self.measured <= self.limit


Ratios = Iterator[tuple[str, float, float]]  # quantity, measured, limit


def measure_targets(
    names: Sequence[str], poses: int, long_group: int, repeats: int, device: torch.device | str
) -> Iterator[Target]:
    """Measure all targets.

    Args:
        names: Names of reference models.
        poses: Poses of a group.
        long_group: Poses of a long group.
        repeats: Timed rounds.
        device: Where to run.
    """
    for name in names:
        runner = TrialRunner(name, poses, long_group, repeats, device)
        for measure in (_uniform_weights, _two_sums, _sharp_minimum, _long_group):
            with flushed_denormals():
                ratios = list(measure(runner))
            yield from (Target(name, *ratio) for ratio in ratios)


def _uniform_weights(runner: TrialRunner) -> Ratios:
    """Measure combinations in which every pose matters, so that no backward can be skipped."""
    plain_peak = runner.plain_step_peak(runner.poses)
    for title, combination in (("mean", Mean()), ("min, scale 1", Min(1 / runner.spread))):
        names = ("full graph", "checkpoint per pose", "stream", "recompute", "auto")
        trials = {name: Trial(name, combination, runner.poses) for name in names}
        trials[KEPT_GRAPHS] = Trial("auto", combination, runner.poses, {"memory": "64GiB"})
        results = runner.run(trials)
        full_graph, stream, recompute = results["full graph"], results["stream"], results["recompute"]
        yield f"{title}: stream / full graph, time", _time_ratio(stream, full_graph), 1.03
        yield f"{title}: stream / plain steps, time", _time_ratio(stream, results["plain steps"]), 1.05
        yield f"{title}: stream / a plain step, peak", stream.peak_bytes / plain_peak, 1.02
        yield f"{title}: recompute / checkpoint, time", _time_ratio(recompute, results["checkpoint per pose"]), 0.95
        yield f"{title}: recompute / a plain step, peak", recompute.peak_bytes / plain_peak, 1.02
        yield f"{title}: {KEPT_GRAPHS} / full graph, time", _time_ratio(results[KEPT_GRAPHS], full_graph), 1.03
        yield _auto_to_best(title, results)


def _two_sums(runner: TrialRunner) -> Ratios:
    """Measure a combination whose stream keeps two copies of the gradients."""
    names = ("full graph", "stream", "recompute", "auto")
    results = runner.run({name: Trial(name, Boltzmann(runner.spread), runner.poses) for name in names})
    stream, allowed = results["stream"], 1.02 * runner.plain_step_peak(runner.poses) + runner.gradient_bytes()
    yield "boltzmann: stream / full graph, time", _time_ratio(stream, results["full graph"]), 1.08
    yield "boltzmann: stream / (1.02 plain step + one gradient), peak", stream.peak_bytes / allowed, 1.0
    yield _auto_to_best("boltzmann", results)


def _sharp_minimum(runner: TrialRunner) -> Ratios:
    """Measure a combination in which few poses matter."""
    sharp, level = Min(1000 / runner.spread), Min(1 / runner.spread)
    for poses in (runner.poses, max(1, runner.long_group // 4)):
        trials = {name: Trial(name, sharp, poses) for name in ("stream", "recompute", "auto")}
        results = runner.run({"full graph": Trial("full graph", level, runner.poses), **trials})
        title, auto = f"min, scale 1000, N = {poses}", results["auto"]
        per_pose = _time_ratio(auto, results["full graph"]) * runner.poses / poses
        yield f"{title}: auto / full graph at scale 1, time per pose", per_pose, 0.40
        yield f"{title}: auto / lower bound, time", _to_lower_bound(results, poses, runner.poses), 1.15
        yield f"{title}: auto / a plain step, peak", auto.peak_bytes / runner.plain_step_peak(poses), 1.02
        yield _auto_to_best(title, results)


def _long_group(runner: TrialRunner) -> Ratios:
    """Measure how time and memory grow with the number of poses."""
    short, long = runner.poses, runner.long_group
    results = runner.run({str(poses): Trial("auto", Mean(), poses) for poses in (short, long)})
    few, many = results[str(short)], results[str(long)]
    title = f"mean: auto, N = {long} / N = {short}"
    yield f"{title}, time per pose", _time_ratio(many, few) * short / long, 1.05
    bookkeeping = BYTES_PER_PREDICTION * (long - short)
    ratio = (many.peak_bytes - bookkeeping) / few.peak_bytes
    yield f"{title}, peak without {BYTES_PER_PREDICTION} bytes per pose", ratio, 1.01


def _time_ratio(measurement: Measurement, reference: Measurement) -> float:
    return median_ratio(measurement.seconds, reference.seconds)


def _auto_to_best(title: str, results: Mapping[str, Measurement]) -> tuple[str, float, float]:
    """Return the time of `auto` relative to the faster accumulator."""
    ratios = [_time_ratio(results["auto"], results[name]) for name in ("stream", "recompute")]
    return f"{title}: auto / best accumulator, time", max(ratios), 1.05


def _to_lower_bound(results: Mapping[str, Measurement], poses: int, plain: int) -> float:
    """Return the time of `auto` relative to a forward per pose and a step per pose that matters.

    The lower bound is `(N - k) F + k S` with `k` poses that matter; `F` and `S` are measured on `plain` poses.
    """
    matter = results["recompute"].backwards
    bounds = [
        ((poses - matter) * forward + matter * step) / plain
        for forward, step in zip(results["plain forwards"].seconds, results["plain steps"].seconds, strict=True)
    ]
    return median_ratio(results["auto"].seconds, bounds)


def target_table(targets: Sequence[Target]) -> str:
    """Return a table with targets by row and models by column; targets that are not met are marked."""
    models = list(dict.fromkeys(target.model for target in targets))
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for target in targets:
        cells = rows.setdefault((target.quantity, target.limit), {})
        cells[target.model] = f"{target.measured:.3f}{'' if target.met else ' NOT MET'}"
    lines = [
        [quantity, f"{limit:.2f}", *(cells.get(model, "") for model in models)]
        for (quantity, limit), cells in rows.items()
    ]
    return markdown_table(["target", "at most", *models], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the targets from the command line."""
    parser = model_parser(__doc__)
    parser.add_argument("--long-group", type=int, default=1000, help="poses of a long group (default: %(default)s)")
    options = parse_models(parser, arguments)
    targets = []
    for target in measure_targets(options.models, options.poses, options.long_group, options.repeats, options.device):
        progress = f"{target.model}, {target.quantity}: {target.measured:.3f}, at most {target.limit}"
        print(progress, file=sys.stderr, flush=True)  # the whole table takes minutes
        targets.append(target)
    print(target_table(targets))
    save([{**target._asdict(), "met": target.met} for target in targets], options.save)


if __name__ == "__main__":
    main()

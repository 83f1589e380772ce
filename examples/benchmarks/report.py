"""Compare time and peak memory of the accumulators with the full graph, on the reference models.

Prints a table per model and combination, and a summary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from command_line import flushed_denormals, markdown_table, model_parser, parse_models, save
from models import Reference, reference

from gradhooks import Combination
from gradhooks.combinations import Boltzmann, Mean, Min
from gradhooks.profiling.comparison import Comparison, compare_steps
from gradhooks.profiling.training_batch import TrainingBatch
from gradhooks.profiling.training_steps import checkpoint_step, full_graph_step, multipose_step

# Options of MultiPose by the name of a row.
ROWS: dict[str, Mapping[str, Any]] = {
    "stream": {"accumulator": "stream", "memory": 0},
    "recompute": {"accumulator": "recompute", "memory": 0},
    "auto, memory=0": {"accumulator": "auto", "memory": 0},
    "auto, memory=64GiB": {"accumulator": "auto", "memory": "64GiB"},
}
SHORT = ("stream", "recompute", "auto, memory=0")


class Result(NamedTuple):
    """The comparison of the accumulators for one model and combination."""

    model: str
    combination: str
    comparison: Comparison


def benchmark(names: Sequence[str], poses: int, repeats: int, device: torch.device | str) -> Iterator[Result]:
    """Compare the accumulators for a mean, a Boltzmann average and a sharp minimum.

    Temperature and scale are relative to the spread of the predictions: at scale 1000 few poses matter.

    Args:
        names: Names of reference models.
        poses: Poses of a group.
        repeats: Timed rounds.
        device: Where to run.
    """
    for name in names:
        group = reference(name, poses, device)
        for title, combination, rows in (
            ("mean", Mean(), tuple(ROWS)),
            ("boltzmann", Boltzmann(group.spread), SHORT),
            ("min, scale 1000", Min(1000 / group.spread), SHORT),
        ):
            with flushed_denormals():
                comparison = _compare(group, combination, rows, repeats)
            yield Result(name, title, comparison)


def _compare(group: Reference, combination: Combination, rows: Sequence[str], repeats: int) -> Comparison:
    batch = TrainingBatch(group.model, group.poses, combination)
    steps = [
        full_graph_step(batch),
        checkpoint_step(batch),
        *(multipose_step(batch, name=row, **ROWS[row]) for row in rows),
    ]
    return compare_steps(batch, steps, repeats=repeats)


def summary(results: Sequence[Result]) -> str:
    """Return one table of all results: time and peak memory relative to the full graph, models by column."""
    models = list(dict.fromkeys(result.model for result in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        full_graph = result.comparison.rows[0]
        for row in result.comparison.rows[1:]:
            cells = rows.setdefault((result.combination, row.name), {})
            cells[result.model] = f"{row.time_ratio:.2f} / {row.peak_bytes / full_graph.peak_bytes:.3f}"
    lines = [
        [f"{combination}: {row}", *(cells.get(model, "") for model in models)]
        for (combination, row), cells in rows.items()
    ]
    return markdown_table(["time / peak memory, full graph = 1", *models], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parse_models(model_parser(__doc__), arguments)
    results = []
    for result in benchmark(options.models, options.poses, options.repeats, options.device):
        print(f"{result.model}, {result.combination}\n\n{result.comparison}\n", flush=True)
        results.append(result)
    print(summary(results))
    save([result._asdict() | {"comparison": asdict(result.comparison)} for result in results], options.save)


if __name__ == "__main__":
    main()

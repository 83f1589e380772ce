"""bench: the figures of the README, on the reference models."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import REFERENCES
from gradhooks.accumulators import Recompute, Stream
from gradhooks.combinations import Boltzmann, Mean, Min
from gradhooks.engine.nested import map_tensors
from gradhooks.profiling.comparison import Comparison, compare
from gradhooks.profiling.table import table
from gradhooks.wrapper import MultiPose


class Finding(NamedTuple):
    """What was found for a model and a combination."""

    model: str
    combination: str
    comparison: Comparison


def benchmark(names: Sequence[str], poses: int, repeats: int, device: torch.device | str = "cpu") -> Iterator[Finding]:
    """Compare the ways on reference models, with a mean, a Boltzmann average and a sharp minimum.

    Temperature and scale are relative to the spread of the predictions: at scale 1000 few poses matter. Numbers too
    small for a normalised float count as zero meanwhile; a full graph of a sharp minimum would be several times slower
    with them, and every ratio to it flattered.

    Args:
        names: Of reference models.
        poses: N.
        repeats: Rounds that count.
        device: Where to run.

    Yields:
        What was found.
    """
    flushing = torch.set_flush_denormal(True)
    try:
        for name in names:
            model, group, spread = reference(name, poses, device)
            combinations = [
                ("mean", Mean(), ("stream", "recompute", Recompute(retain="64GiB"), "auto")),
                ("boltzmann", Boltzmann(spread), ("stream", "recompute", "auto")),
                ("min, scale 1000", Min(1000 / spread), (Stream(), "recompute", "auto")),
            ]
            for title, combination, accumulators in combinations:
                found = compare(model, group, combination, accumulators=accumulators, repeats=repeats)
                yield Finding(name, title, found)
    finally:
        torch.set_flush_denormal(not flushing)


def summary(findings: Sequence[Finding]) -> str:
    """The README's table: time and peak memory of each way, both relative to the full graph's, by model."""
    models = list(dict.fromkeys(finding.model for finding in findings))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for finding in findings:
        full = finding.comparison.rows[0].peak_bytes
        for row in finding.comparison.rows[1:]:
            cells = rows.setdefault((finding.combination, row.way), {})
            cells[finding.model] = f"{row.time_ratio:.2f} / {row.peak_bytes / full:.3f}"
    lines = [
        [f"{combination}: {way}", *(cells.get(model, "") for model in models)]
        for (combination, way), cells in rows.items()
    ]
    return table(["time / peak memory, full graph = 1", *models], lines)


def save(findings: Sequence[Finding], path: str | Path) -> None:
    """Write all figures as JSON."""
    figures = [finding._asdict() | {"comparison": asdict(finding.comparison)} for finding in findings]
    Path(path).write_text(json.dumps(figures, indent=2) + "\n")


def reference(name: str, poses: int, device: torch.device | str) -> tuple[nn.Module, list[Any], float]:
    """A reference model, a group for it, and the spread of its predictions."""
    torch.manual_seed(0)
    model, make_pose = REFERENCES[name]()
    model.to(device)
    group = [map_tensors(lambda tensor: tensor.to(device), make_pose(seed)) for seed in range(poses)]
    with torch.no_grad():
        predictions: Tensor = MultiPose(model)(group[:32]).per_pose
    return model, group, predictions.std().item()

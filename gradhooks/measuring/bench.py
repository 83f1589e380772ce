"""bench: the figures of the README, on the reference models."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradhooks.accumulators import Recompute, Stream
from gradhooks.combinations import Boltzmann, Mean, Min
from gradhooks.measuring.compare import Comparison, compare
from gradhooks.measuring.reference import REFERENCES
from gradhooks.multipose import MultiPose
from gradhooks.trees import map_tensors


def benchmark(
    names: Sequence[str], poses: int, repeats: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Comparison]]:
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
        A title, and what was found.
    """
    flushing = torch.set_flush_denormal(True)
    try:
        for name in names:
            torch.manual_seed(0)
            model, make_pose = REFERENCES[name]()
            model.to(device)
            group: list[Any] = [map_tensors(lambda tensor: tensor.to(device), make_pose(seed)) for seed in range(poses)]
            spread = _spread(MultiPose(model), group)
            combinations = [
                ("mean", Mean(), ("stream", "recompute", Recompute(retain="64GiB"), "auto")),
                ("boltzmann", Boltzmann(spread), ("stream", "recompute", "auto")),
                ("min, scale 1000", Min(1000 / spread), (Stream(), "recompute", "auto")),
            ]
            for title, combination, accumulators in combinations:
                yield f"{name}, {title}", compare(model, group, combination, accumulators=accumulators, repeats=repeats)
    finally:
        torch.set_flush_denormal(not flushing)


def save(found: Sequence[tuple[str, Comparison]], path: str | Path) -> None:
    """Write all figures as JSON."""
    Path(path).write_text(json.dumps({title: asdict(comparison) for title, comparison in found}, indent=2) + "\n")


def _spread(scorer: MultiPose, poses: Sequence[Any]) -> float:
    with torch.no_grad():
        predictions: Tensor = scorer(poses).poses
    return predictions.std().item()

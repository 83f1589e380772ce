"""What a contrastive step costs: one full graph, GradCache's two passes, and scorers by values of `memory=`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from conformers import collate_molecules
from molecule_encoders import Encoders, Graph, Molecules, collate_graphs, info_nce

import gradhooks
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.timing import interleaved_seconds

COST_MOLECULES = 64  # of the step that is measured
CHUNK = 8  # conformers of a chunk where memory is least, and in GradCache's passes


class Cost(NamedTuple):
    """What a step on a large batch costs.

    Attributes:
        way: How it is run.
        seconds: Duration of the fastest of a few.
        peak: Bytes.
        error: Largest difference of a gradient from the full graph's, relative to the largest gradient.
    """

    way: str
    seconds: float
    peak: int
    error: float


Step = Callable[[Encoders, list[Graph], gradhooks.Groups], None]


def full_graph(encoders: Encoders, graphs: list[Graph], groups: gradhooks.Groups) -> None:
    """Fill `.grad` with the graph of the whole batch in memory."""
    embeddings = encoders.conformer.model(*collate_molecules(groups.poses))
    pooled = encoders.conformer.combination.forward_groups(embeddings, groups.index, int(groups.index.max()) + 1)
    info_nce(encoders.graph.model(*collate_graphs(graphs)), pooled).backward()


def two_passes(encoders: Encoders, graphs: list[Graph], groups: gradhooks.Groups) -> None:
    """Fill `.grad` as GradCache does (Gao et al., 2021, arXiv:2101.06983): embeddings first, then chunks again."""
    sides = [
        (encoders.graph.model, [collate_graphs(graphs[i : i + CHUNK]) for i in range(0, len(graphs), CHUNK)]),
        (
            encoders.conformer.model,
            [collate_molecules(groups.poses[i : i + CHUNK]) for i in range(0, len(groups), CHUNK)],
        ),
    ]
    with torch.no_grad():
        cached = [torch.cat([model(*chunk) for chunk in chunks]).requires_grad_() for model, chunks in sides]
    pooled = encoders.conformer.combination.forward_groups(cached[1], groups.index, len(graphs))
    info_nce(cached[0], pooled).backward()
    for (model, chunks), embeddings in zip(sides, cached, strict=True):
        for chunk, gradient in zip(chunks, embeddings.grad.split(CHUNK), strict=True):
            torch.autograd.backward(model(*chunk), gradient)


def _chunks(poses: list[Any], collate: Callable[[list[Any]], Any]) -> list[Any]:
    return [collate(poses[start : start + CHUNK]) for start in range(0, len(poses), CHUNK)]


def with_scorers(encoders: Encoders, graphs: list[Graph], groups: gradhooks.Groups) -> None:
    """Fill `.grad` by the loss that the training uses."""
    encoders.loss(graphs, groups).backward()


def costs(molecules: Molecules, make: Callable[..., Encoders], device: torch.device) -> list[Cost]:
    """Measure a step on a batch of `COST_MOLECULES` with encoders that `make` returns, given options of the scorers."""
    graphs, groups = molecules.batch(range(min(COST_MOLECULES, len(molecules.graphs))))
    steps = {"full graph, batched": (make(), full_graph), "GradCache's two passes": (make(), two_passes)}
    for memory in ("1GiB", "8MiB"):
        steps[f"MultiPose, memory={memory}"] = (make(memory=memory), with_scorers)
    steps[f"MultiPose, memory=0, chunks of {CHUNK}"] = (make(memory=0, chunk_size=CHUNK), with_scorers)
    runs = [partial(_run, encoders, step, graphs, groups) for encoders, step in steps.values()]
    for run in runs * 2:  # in which needs are measured
        run()
    gradients = [
        torch.cat([leaf.grad.flatten() for leaf in encoders.parameters() if leaf.grad is not None])
        for encoders, _ in steps.values()
    ]
    errors = [((each - gradients[0]).abs().max() / gradients[0].abs().max()).item() for each in gradients]
    peaks = [peak_bytes(run, device) for run in runs]
    seconds = [min(times) for times in interleaved_seconds(runs, 3, device)]
    return [Cost(*row) for row in zip(steps, seconds, peaks, errors, strict=True)]


def _run(encoders: Encoders, step: Step, graphs: list[Graph], groups: gradhooks.Groups) -> None:
    for leaf in encoders.parameters():
        leaf.grad = None
    step(encoders, graphs, groups)

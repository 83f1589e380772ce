"""Compare a contrastive step in chunks with GradCache, sentence-transformers, checkpoints and one full graph."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from command_line import markdown_table, parser, save
from contrastive_steps import Step, TokenEncoder, lines_of, ways
from torch import Tensor

from gradhooks.profiling.gradient_error import gradient_error
from gradhooks.profiling.peak_memory import peak_bytes
from gradhooks.profiling.timing import interleaved_seconds, median_ratio
from gradhooks.units import format_bytes, format_seconds

WARM_UP_STEPS = 2
FULL_GRAPH = "full graph, batched"
OURS = ("MultiPose, memory=0", "MultiPose, memory=0, loss in parts")
PEERS = ("GradCache", "CachedMultipleNegativesRankingLoss", "two passes")
TIME_LIMIT = PEAK_LIMIT = 1.05


class Comparison(NamedTuple):
    """One way to run the step.

    Attributes:
        pairs: M, the pairs of a query and a passage.
        chunk: The sequences of a chunk.
        way: How the step is run.
        seconds: Median time of a step.
        time_ratio: Median ratio to the time of the fastest peer in the same round.
        peak: Peak of a step in bytes, beyond the model and its gradients.
        peak_ratio: Ratio to the peak of the leanest peer.
        error: The largest error of a gradient relative to its norm, beside the full graph.
        lines: The lines that a user writes.
    """

    pairs: int
    chunk: int
    way: str
    seconds: float
    time_ratio: float
    peak: int
    peak_ratio: float
    error: float
    lines: int

    @property
    def met(self) -> bool:
        """Whether time and peak are within the limits; only those of `OURS` are limited."""
        return self.way not in OURS or (self.time_ratio <= TIME_LIMIT and self.peak_ratio <= PEAK_LIMIT)


def measure(
    sizes: Sequence[int], chunks: Sequence[int], encoder: TokenEncoder, tokens: int, repeats: int
) -> Iterator[Comparison]:
    """Measure every way for each number of pairs and each size of a chunk."""
    device = next(encoder.parameters()).device
    for pairs, chunk in product(sizes, chunks):
        torch.manual_seed(0)
        queries, passages = (torch.randint(1000, (pairs, tokens), device=device) for _ in range(2))
        steps = {name: way(encoder, chunk) for name, way in ways().items()}
        runs = {name: partial(_run, encoder, step, queries, passages) for name, step in steps.items()}
        gradients = {name: _gradients(encoder, run) for name, run in runs.items()}
        for _ in range(WARM_UP_STEPS - 1):
            for run in runs.values():
                run()
        peaks = {name: _peak(encoder, run, device) for name, run in runs.items()}
        seconds = dict(zip(runs, interleaved_seconds(list(runs.values()), repeats, device), strict=True))
        peers = [name for name in PEERS if name in runs]
        fastest = [min(times) for times in zip(*(seconds[name] for name in peers), strict=True)]
        for name, way in ways().items():
            yield Comparison(
                pairs,
                chunk,
                name,
                sorted(seconds[name])[repeats // 2],
                median_ratio(seconds[name], fastest),
                peaks[name],
                peaks[name] / min(peaks[peer] for peer in peers),
                gradient_error(gradients[name], gradients[FULL_GRAPH]),
                lines_of(way),
            )


def _run(encoder: TokenEncoder, step: Step, queries: Tensor, passages: Tensor) -> None:
    encoder.zero_grad()
    step(queries, passages)


def _gradients(encoder: TokenEncoder, run: partial[None]) -> list[Tensor | None]:
    run()
    return [None if leaf.grad is None else leaf.grad.clone() for leaf in encoder.parameters()]


def _peak(encoder: TokenEncoder, run: partial[None], device: torch.device) -> int:
    """Return the peak of a step; one copy of the gradients, which every way ends with, does not count."""
    encoder.zero_grad()
    return peak_bytes(run, device) - sum(leaf.nbytes for leaf in encoder.parameters())


def table(comparisons: Sequence[Comparison]) -> str:
    """Return a table with a row for each comparison; ratios above their limit are bold."""
    rows = [
        [
            each.way,
            str(each.pairs),
            str(each.chunk),
            format_seconds(each.seconds),
            _marked(each.time_ratio, TIME_LIMIT, each),
            format_bytes(each.peak),
            _marked(each.peak_ratio, PEAK_LIMIT, each),
            f"{each.error:.1e}",
            str(each.lines),
        ]
        for each in comparisons
    ]
    headers = ["step", "M", "chunk", "time", "/ fastest peer", "peak", "/ leanest peer", "error", "lines"]
    return markdown_table(headers, rows)


def _marked(ratio: float, limit: float, comparison: Comparison) -> str:
    return f"**{ratio:.2f}**" if comparison.way in OURS and ratio > limit else f"{ratio:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parser(__doc__, repeats=5)
    options.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024], help="M (default: %(default)s)")
    options.add_argument("--chunks", nargs="+", type=int, default=[8, 32], help="default: %(default)s")
    options.add_argument("--width", type=int, default=128, help="of the encoder (default: %(default)s)")
    options.add_argument("--embedding", type=int, default=256, help="size of an embedding (default: %(default)s)")
    options.add_argument("--layers", type=int, default=2, help="of the encoder (default: %(default)s)")
    options.add_argument("--tokens", type=int, default=16, help="of a sequence (default: %(default)s)")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    encoder = TokenEncoder(chosen.width, chosen.embedding, chosen.layers).to(chosen.device)
    comparisons = list(measure(chosen.sizes, chosen.chunks, encoder, chosen.tokens, chosen.repeats))
    print(table(comparisons))
    save([{**each._asdict(), "met": each.met} for each in comparisons], chosen.save)


if __name__ == "__main__":
    main()

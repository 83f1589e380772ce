"""What the command lines of the benchmarks share."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from models import REFERENCE_MODELS
from tabulate import tabulate


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--repeats", type=int, default=repeats, help="timed rounds (default: %(default)s)")
    options.add_argument("--device", default="cpu", help="default: %(default)s")
    options.add_argument("--threads", type=int, default=1, help="CPU threads of a process (default: %(default)s)")
    options.add_argument("--save", metavar="FILE", help="write the figures as JSON")
    return options


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for benchmarks on reference models."""
    options = parser(description, repeats=5)
    options.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(REFERENCE_MODELS)} (default: all)")
    options.add_argument("--poses", type=int, default=32, help="poses of a group (default: %(default)s)")
    return options


def parse_models(options: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of a benchmark on reference models and set the number of threads."""
    parsed = options.parse_args(arguments)
    unknown = [name for name in parsed.models if name not in REFERENCE_MODELS]
    if unknown:
        options.error(f"unknown model {', '.join(unknown)}; available: {', '.join(REFERENCE_MODELS)}")
    parsed.models = parsed.models or list(REFERENCE_MODELS)
    torch.set_num_threads(parsed.threads)
    return parsed


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat denormal numbers as zero in the block.

    With a sharp minimum many coefficients are denormal. They make the full graph several times slower, and every ratio
    to it would look better than it is.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column aligned left, the others right."""
    alignment = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=alignment)


def save(figures: list[dict[str, Any]], path: str | None) -> None:
    """Write figures as JSON, if there is a path."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=2) + "\n")

"""`python -m gradhooks`: what is installed, and whether it keeps its promises.

A subcommand is a function that adds its parser and names what runs it; list it in `COMMANDS`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from typing import Any, NamedTuple

import torch

from gradhooks import registry
from gradhooks.conformance.derivatives import declares_stream
from gradhooks.conformance.kit import results
from gradhooks.errors import GradhooksError
from gradhooks.measuring import promises, sharing
from gradhooks.measuring.bench import benchmark, save, summary
from gradhooks.measuring.reference import REFERENCES
from gradhooks.registry import Registry

Subparsers = Any  # argparse's own type is private


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gradhooks", description="What is installed, and whether it holds.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(subparsers)
    chosen = parser.parse_args(arguments)
    status: int = chosen.run(chosen)
    return status


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


class Row(NamedTuple):
    """What is known of one plugin."""

    name: str
    kind: str
    distribution: str
    version: str
    streamable: str
    state: str


def _add_plugins(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("plugins", help="list combinations and accumulators, broken ones with what is wrong")
    parser.set_defaults(run=_run_plugins)


def _run_plugins(chosen: argparse.Namespace) -> int:
    del chosen
    rows = [row for kind in (registry.combinations, registry.accumulators) for row in _rows(kind)]
    _say(*_table([Row(*(field.upper() for field in Row._fields)), *rows]))
    return 0


def _rows(plugins: Registry) -> Iterator[Row]:
    listed = plugins.available()
    for short, points in sorted(plugins.claims().items()):
        for point in points:
            distribution, version = _origin(point)
            name = f"{distribution}:{short}" if f"{distribution}:{short}" in listed else short
            others = ", ".join(_origin(other)[0] for other in points if other is not point)
            streamable, state = _state(plugins, name)
            if others and state == "ok":
                state = f"ok under this name; {short!r} is also claimed by {others}"
            yield Row(name, plugins.kind, distribution, version, streamable, state)


def _origin(point: EntryPoint) -> tuple[str, str]:
    return ("?", "?") if point.dist is None else (point.dist.name, point.dist.version)


def _state(plugins: Registry, name: str) -> tuple[str, str]:
    """Whether it can stream, and `ok` or what is wrong."""
    try:
        made = plugins.create(name)
        streamable = "-" if plugins is registry.accumulators else "yes" if declares_stream(made) else "no"
    except Exception as fault:  # whatever one plugin does, the others are listed
        message = str(fault) if isinstance(fault, GradhooksError) else f"{type(fault).__name__}: {fault}"
        return "?", " ".join(message.split())
    return streamable, "ok"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _add_check(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("check", help="run the conformance kit on a plugin; exit status 1 if it fails")
    parser.add_argument("name", metavar="NAME", help="name, or distribution:name")
    parser.add_argument("--accumulator", action="store_true", help="NAME is an accumulator, not a combination")
    parser.set_defaults(run=_run_check)


def _run_check(chosen: argparse.Namespace) -> int:
    plugins = registry.accumulators if chosen.accumulator else registry.combinations
    try:
        plugin = plugins.create(chosen.name)
        found = list(results(plugin))
    except (GradhooksError, ValueError) as fault:
        _say(str(fault))
        return 2
    for result in found:
        _say(f"{result.state:>16}  {result.check}" if result.good else f"{result.state:>16}  {result.message}")
        if result.state == "expected failure":
            _say(f"{'':>16}  {result.message}")
    bad = sum(not result.good for result in found)
    _say(f"{plugins.kind} {chosen.name!r}: {len(found) - bad} of {len(found)} checks as they should be")
    return 1 if bad else 0


def _add_bench(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("bench", help="measure time and memory on reference models (the README's figures)")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(REFERENCES)}; all by default")
    parser.add_argument("--poses", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--promises", action="store_true", help="what is promised, and whether it is met")
    parser.add_argument("--many", type=int, default=1000, help="poses of a long group, for --promises")
    parser.add_argument("--ranks", type=int, nargs="+", help="what sharing a group over so many processes costs")
    parser.add_argument("--save", metavar="FILE", help="write the figures as JSON")
    parser.set_defaults(run=_run_bench)


def _run_bench(chosen: argparse.Namespace) -> int:
    unknown = set(chosen.models) - set(REFERENCES)
    if unknown:
        _say(f"unknown model {', '.join(sorted(unknown))}: available are {', '.join(REFERENCES)}")
        return 2
    torch.set_num_threads(chosen.threads)
    models = chosen.models or list(REFERENCES)
    if chosen.ranks:
        shared = list(sharing.sharing(chosen.ranks, chosen.repeats, chosen.device))
        _say(sharing.as_table(shared))
        if chosen.save:
            sharing.save(shared, chosen.save)
        return 0
    if chosen.promises:
        kept = []
        for promise in promises.promises(models, chosen.poses, chosen.many, chosen.repeats, chosen.device):
            sys.stderr.write("{}, {}: {:.3f}, at most {}\n".format(*promise))  # the whole takes its time
            kept.append(promise)
        _say(promises.as_table(kept))
        if chosen.save:
            promises.save(kept, chosen.save)
        return 0
    findings = []
    for finding in benchmark(models, chosen.poses, chosen.repeats, chosen.device):
        comparison = finding.comparison
        _say(f"{finding.model}, {finding.combination} ({comparison.setting})", "", str(comparison), "")
        findings.append(finding)
    _say(summary(findings))
    if chosen.save:
        save(findings, chosen.save)
    return 0


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (_add_plugins, _add_check, _add_bench)

"""`python -m gradhooks`: what is installed, and whether it keeps its promises.

A subcommand is a function that adds its parser and names what runs it; list it in `COMMANDS`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from typing import Any, NamedTuple

from gradhooks import registry
from gradhooks.errors import GradhooksError
from gradhooks.registry import Registry
from gradhooks.testing.check_derivatives import declares_stream
from gradhooks.testing.runner import results

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


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (_add_plugins, _add_check)

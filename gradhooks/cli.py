"""`python -m gradhooks`: list plugins and check them.

A subcommand is a function that adds its parser and sets `run`, the function that executes it; add it to `COMMANDS`.
"""

import argparse
import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tabulate import tabulate

import gradhooks
from gradhooks.entry_points import PluginEntry
from gradhooks.errors import GradhooksError, PluginError
from gradhooks.plugin_check import REGISTRIES, Job, State, check_plugins
from gradhooks.registry import Registry, unknown_name
from gradhooks.testing.runner import create_example, results

Subparsers = Any  # argparse's own type is private
Cells = tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gradhooks", description="List plugins and check them.")
    parser.add_argument("--version", action="version", version=f"gradhooks {gradhooks.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(subparsers)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _print(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _add_plugins(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("plugins", help="list combinations and accumulators; imports no plugin")
    parser.add_argument("--check", action="store_true", help="import each plugin and say what is wrong with it")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="with --check: give up on a plugin after this time; by default it may take any time",
    )
    parser.set_defaults(run=_run_plugins)


def _run_plugins(options: argparse.Namespace) -> int:
    headers = ["NAME", "KIND", "DISTRIBUTION", "VERSION", *(["STREAMS"] if options.check else []), "STATE"]
    rows = [row for plugins in REGISTRIES for row in _plugin_rows(plugins)]
    if options.check:
        states = check_plugins([Job(kind, name) for name, kind, *_ in rows], options.timeout)
        rows = [_with_state(row, state) for row, state in zip(rows, states, strict=True)]
    _print(tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True))
    return 0


def _plugin_rows(plugins: Registry[Any]) -> Iterator[Cells]:
    """Yield name, kind, distribution, version and state of each plugin, of which none is imported."""
    available = plugins.available()
    for short, entries in sorted(plugins.entries().items()):
        for entry in entries:
            name = f"{entry.distribution}:{short}" if f"{entry.distribution}:{short}" in available else short
            state = "built in" if entry.built_in else "not loaded"
            clash = _clash(short, entry, entries)
            yield name, plugins.kind, entry.distribution, entry.version, f"{state}; {clash}" if clash else state


def _with_state(row: Cells, state: State) -> Cells:
    """Return the row of a plugin with what the check has found; a clash of names stays."""
    clash = row[-1].partition("; ")[2]
    return (*row[:-1], state.streams, f"{state.text}; {clash}" if clash and state.text == "ok" else state.text)


def _clash(name: str, entry: PluginEntry, entries: Sequence[PluginEntry]) -> str:
    """Return which other distributions provide the same name; empty if there are none."""
    others = ", ".join(other.distribution for other in entries if other is not entry)
    return f"{name!r} is also provided by {others}" if others else ""


def _add_check(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("check", help="run the conformance kit on a plugin; exit status 1 if a check fails")
    parser.add_argument(
        "name", metavar="NAME", help="name or distribution:name; KIND:name if a combination and an accumulator have it"
    )
    parser.add_argument(
        "options",
        metavar="OPTION=VALUE",
        nargs="*",
        type=_option,
        help="an option of the plugin, as in combination_options: features=64",
    )
    parser.set_defaults(run=_run_check)


def _option(text: str) -> tuple[str, Any]:
    """Return the name and the value of an option; a value that is no literal of Python is a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"expected OPTION=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _run_check(options: argparse.Namespace) -> int:
    try:
        plugins, name = _registry_of(options.name)
        outcomes = list(results(create_example(plugins, name, dict(options.options))))
    except (GradhooksError, ValueError) as error:
        _print(str(error))
        return 2
    for outcome in outcomes:
        _print(f"{outcome.state:>16}  {outcome.check if outcome.good else outcome.message}")
        if outcome.state == "expected failure":
            _print(f"{'':>16}  {outcome.message}")
    bad = sum(not outcome.good for outcome in outcomes)
    _print(f"{plugins.kind} {name!r}: {len(outcomes) - bad} of {len(outcomes)} checks as expected")
    return 1 if bad else 0


def _registry_of(name: str) -> tuple[Registry[Any], str]:
    """Return the registry that has a name, and the name in it.

    `combination:` or `accumulator:` before a name chooses the registry; otherwise exactly one of them must have it.

    Raises:
        PluginError: Neither registry has the name, or both have it.
    """
    prefix, _, rest = name.partition(":")
    for plugins in REGISTRIES:
        if rest and prefix == plugins.kind:
            return plugins, rest
    having = [plugins for plugins in REGISTRIES if plugins.has(name)]
    if not having:
        raise PluginError(unknown_name(name, *REGISTRIES))
    if len(having) > 1:
        choices = " or ".join(repr(f"{plugins.kind}:{name}") for plugins in having)
        raise PluginError(f"{name!r} names both a combination and an accumulator; check {choices}")
    return having[0], name


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (_add_plugins, _add_check)

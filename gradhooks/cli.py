"""`python -m gradhooks`: list plugins and check them.

A subcommand is a function that adds its parser and sets `run`, the function that executes it; add it to `COMMANDS`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from typing import Any

from tabulate import tabulate

import gradhooks
from gradhooks import registry
from gradhooks.entry_points import BUILT_IN, distribution_of, version_of
from gradhooks.errors import GradhooksError, PluginError
from gradhooks.plugin_options import required_options
from gradhooks.registry import Registry, unknown_name
from gradhooks.testing.check_derivatives import declares_stream
from gradhooks.testing.runner import create_example, results

Subparsers = Any  # argparse's own type is private
Cells = tuple[str, ...]

REGISTRIES: tuple[Registry[Any], ...] = (registry.combinations, registry.accumulators)


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
    parser.set_defaults(run=_run_plugins)


def _run_plugins(options: argparse.Namespace) -> int:
    headers = ["NAME", "KIND", "DISTRIBUTION", "VERSION", *(["STREAMS"] if options.check else []), "STATE"]
    rows = [row for plugins in REGISTRIES for row in _plugin_rows(plugins, check=options.check)]
    _print(tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True))
    return 0


def _plugin_rows(plugins: Registry[Any], *, check: bool) -> Iterator[Cells]:
    available = plugins.available()
    for short, points in sorted(plugins.entry_points().items()):
        for point in points:
            distribution = distribution_of(point)
            name = f"{distribution}:{short}" if f"{distribution}:{short}" in available else short
            unchecked = "built in" if distribution == BUILT_IN else "not loaded"
            *streams, state = _checked(plugins, name) if check else (unchecked,)
            clash = _clash(short, point, points)
            if clash and state in ("ok", unchecked):
                state = f"{state}; {clash}"
            yield (name, plugins.kind, distribution, version_of(point), *streams, state)


def _clash(name: str, point: EntryPoint, points: Sequence[EntryPoint]) -> str:
    """Return which other distributions provide the same name; empty if there are none."""
    others = ", ".join(distribution_of(other) for other in points if other is not point)
    return f"{name!r} is also provided by {others}" if others else ""


def _checked(plugins: Registry[Any], name: str) -> Cells:
    """Load a plugin; return whether it streams, and `ok`, the options it needs or what is wrong."""
    try:
        factory = plugins.load(name)
        required = required_options(factory)
        state = f"needs options: {', '.join(required)}" if required else "ok"
        if not set(required) <= set(getattr(factory, "example_options", {})):
            return "?", state
        plugin = create_example(plugins, name)
        streams = "-" if plugins is registry.accumulators else "yes" if declares_stream(plugin) else "no"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # one plugin, even if it calls sys.exit(), must not end the list
        message = str(error) if isinstance(error, GradhooksError) else f"{type(error).__name__}: {error}"
        return "?", " ".join(message.split())
    return streams, state


def _add_check(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("check", help="run the conformance kit on a plugin; exit status 1 if a check fails")
    parser.add_argument(
        "name", metavar="NAME", help="name or distribution:name; KIND:name if a combination and an accumulator have it"
    )
    parser.set_defaults(run=_run_check)


def _run_check(options: argparse.Namespace) -> int:
    try:
        plugins, name = _registry_of(options.name)
        outcomes = list(results(create_example(plugins, name)))
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

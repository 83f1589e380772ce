"""Import plugins in another process, and say what is wrong with each.

A plugin may raise, end its process or never return when it is imported. None of this affects the others: the process is
replaced, and continues with the next plugin.
"""

import contextlib
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from gradhooks import registry
from gradhooks.errors import GradhooksError
from gradhooks.plugin_options import required_options
from gradhooks.registry import Registry, describe_error
from gradhooks.testing.check_derivatives import declares_stream
from gradhooks.testing.runner import create_example

REGISTRIES: tuple[Registry[Any], ...] = (registry.combinations, registry.accumulators)


class Job(NamedTuple):
    """A plugin to check.

    Attributes:
        kind: The kind of its registry.
        name: Its name there.
    """

    kind: str
    name: str


class State(NamedTuple):
    """The result of a check.

    Attributes:
        streams: Whether a combination declares `stream_weights`: "yes", "no", "?", or "-" for an accumulator.
        text: `ok`, the options that the plugin needs, or what is wrong.
    """

    streams: str
    text: str


def check_plugins(jobs: Sequence[Job], timeout: float | None = None) -> list[State]:
    """Check plugins one after the other in another process.

    Args:
        jobs: The plugins.
        timeout: Seconds that each may take; None for any time.

    Returns:
        The state of each plugin.
    """
    states: list[State] = []
    while len(states) < len(jobs):
        states += _check_until_failure(jobs[len(states) :], timeout)
    return states


def _check_until_failure(jobs: Sequence[Job], timeout: float | None) -> Iterator[State]:
    """Start a process, and yield the states of plugins until one of them ends the process or takes too long."""
    context = multiprocessing.get_context("spawn")  # a plugin must find a process in which nothing has run
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, list(jobs)), daemon=True)
    process.start()
    there.close()  # so that the end of the process is noticed
    try:
        here.recv()  # the process has imported gradhooks
        for _ in jobs:
            if not here.poll(timeout):
                yield State("?", f"it had not finished after {timeout:g} s")
                return
            yield here.recv()
    except EOFError:
        process.join()
        yield State("?", f"it ended the process, exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _work(pipe: Connection, jobs: Sequence[Job]) -> None:
    pipe.send(None)
    registries = {plugins.kind: plugins for plugins in REGISTRIES}
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints is no part of the table
        for kind, name in jobs:
            pipe.send(_check(registries[kind], name))


def _check(plugins: Registry[Any], name: str) -> State:
    try:
        factory = plugins.load(name)
        required = required_options(factory)
        text = f"needs options: {', '.join(required)}" if required else "ok"
        if not set(required) <= set(getattr(factory, "example_options", {})):
            return State("?", text)
        plugin = create_example(plugins, name)
        streams = "-" if plugins is registry.accumulators else "yes" if declares_stream(plugin) else "no"
    except BaseException as error:  # also sys.exit()
        message = str(error) if isinstance(error, GradhooksError) else describe_error(error)
        return State("?", " ".join(message.split()))
    return State(streams, text)

"""Names for combinations and accumulators, found through entry points.

Listing names imports nothing. A plugin is imported when it is asked for, so a broken one breaks nobody else; a failure
is not remembered, so mending it is enough.
"""

import difflib
import os
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, distributions, entry_points
from typing import Any, TypeVar

from gradhooks.accumulators.base import Accumulator
from gradhooks.combination import Combination
from gradhooks.errors import GradhooksWarning, PluginError

Factory = TypeVar("Factory", bound=Callable[..., Any])

API_VERSION = 1
"""Of the two contracts. A plugin class may say which one it was written for: `api_version = 1`."""

BUILT_IN = "gradhooks"


class Registry:
    """The names of one kind of plugin.

    Args:
        kind: What they are, for messages.
        group: Their entry-point group.
        contract: The class that what they make must belong to.
    """

    def __init__(self, kind: str, group: str, contract: type) -> None:
        self.kind = kind
        self.group = group
        self.contract = contract
        self._registered: dict[str, Callable[..., Any]] = {}

    def available(self) -> list[str]:
        """Every name, sorted. A name that several distributions claim is given as `distribution:name`.

        A built-in keeps its own: what strangers call so too is had as `distribution:name` only.
        """
        names = {*self._registered}
        for name, points in self.claims().items():
            own = [point for point in points if _distribution(point) == BUILT_IN] or points
            names.update([name] if len(own) == 1 else [])
            names.update(f"{_distribution(point)}:{name}" for point in points if len(points) > 1 and own != [point])
        return sorted(names)

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Name a class or function in this process only, as in a notebook. Registering again replaces it.

        Raises:
            PluginError: An installed distribution has that name.
        """

        def decorate(factory: Factory) -> Factory:
            if name in self.claims():
                raise PluginError(
                    f"{self.kind} {name!r} is already provided by {_listed(self.claims()[name])}; choose another name"
                )
            self._registered[name] = factory
            return factory

        return decorate

    def load(self, name: str) -> Callable[..., Any]:
        """The class or function behind a name.

        Args:
            name: `name`, or `distribution:name` where several distributions claim it.

        Raises:
            PluginError: No such name, several such names, or the plugin cannot be imported.
        """
        distribution, _, short = name.rpartition(":")
        if not distribution and short in self._registered:
            return self._registered[short]
        points = self.claims().get(short, [])
        wanted = distribution or (BUILT_IN if any(_distribution(point) == BUILT_IN for point in points) else "")
        if wanted:
            points = [point for point in points if _normal(_distribution(point)) == _normal(wanted)]
        if not points:
            raise PluginError(self._unknown(name))
        if len(points) > 1:
            choices = " or ".join(repr(f"{_distribution(point)}:{short}") for point in points)
            raise PluginError(f"{self.kind} {name!r} is provided by {_listed(points)}; say {choices}")
        return self._import(points[0])

    def create(self, name: str, **options: Any) -> Any:
        """An object made by what is behind a name.

        Raises:
            PluginError: As `load`; or the options do not fit.
        """
        factory = self.load(name)
        try:
            made = factory(**options)
        except TypeError as fault:
            raise PluginError(f"{self.kind} {name!r} cannot be made with options {options}: {fault}") from fault
        if not isinstance(made, self.contract):
            raise PluginError(f"{self.kind} {name!r} made {made!r}, which is no gradhooks {self.contract.__name__}")
        return made

    def resolve(self, wanted: Any) -> Any:
        """An object for a name; any other callable or object of this kind as it is."""
        if isinstance(wanted, str):
            return self.create(wanted)
        if isinstance(wanted, type) or not (callable(wanted) or isinstance(wanted, self.contract)):
            raise TypeError(f"{self.kind} must be a name or an object (an instance, not a class), got {wanted!r}")
        return wanted

    def claims(self) -> dict[str, list[EntryPoint]]:
        """The entry points by name; nothing is imported."""
        claims: dict[str, list[EntryPoint]] = {}
        for point in _points(self.group):
            if _distribution(point) == BUILT_IN or os.environ.get("GRADHOOKS_DISABLE_PLUGINS", "0") in ("", "0"):
                known = claims.setdefault(point.name, [])
                if all((other.value, _distribution(other)) != (point.value, _distribution(point)) for other in known):
                    known.append(point)  # one distribution can be found twice along sys.path
        return claims

    def _import(self, point: EntryPoint) -> Callable[..., Any]:
        try:
            if not point.pattern.match(point.value):
                raise ValueError(f"an entry point's value must be 'module:object', not {point.value!r}")
            loaded = point.load()
        except Exception as fault:
            raise PluginError(
                f"{self.kind} {point.name!r} of {_listed([point])} cannot be imported from {point.value!r}: "
                f"{type(fault).__name__}: {fault}. Mend or uninstall that distribution"
            ) from fault
        if not callable(loaded) or (isinstance(loaded, type) and not issubclass(loaded, self.contract)):
            raise PluginError(
                f"{self.kind} {point.name!r} of {_listed([point])} is {loaded!r}; its entry point {point.value!r} must "
                f"name a subclass of gradhooks' {self.contract.__name__}, or a function that makes such an object"
            )
        written_for = getattr(loaded, "api_version", API_VERSION)
        if written_for != API_VERSION:
            raise PluginError(
                f"{self.kind} {point.name!r} of {_listed([point])} was written for version {written_for} of the plugin "
                f"contract, this gradhooks has version {API_VERSION}; install versions of the two that fit"
            )
        return loaded  # type: ignore[no-any-return]

    def _unknown(self, name: str) -> str:
        names = self.available()
        if not names:
            return f"no {self.kind} is registered, so gradhooks itself is not installed: pip install -e ."
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown {self.kind} {name!r}: {hint}available are {', '.join(names)}"


def _points(group: str) -> list[EntryPoint]:
    try:
        return list(entry_points(group=group))
    except Exception:  # one unreadable entry_points.txt, of whatever package, spoils the listing of all
        return list(_readable_points(group))


def _readable_points(group: str) -> Iterator[EntryPoint]:
    seen = set()
    for distribution in distributions():
        name = _normal(distribution.metadata["Name"] or "?")
        if name in seen:  # the first one along sys.path is the one that is imported
            continue
        seen.add(name)
        try:
            yield from distribution.entry_points.select(group=group)
        except Exception as fault:
            warnings.warn(
                f"the entry_points.txt of {name} {distribution.version} cannot be read ({type(fault).__name__}: "
                f"{fault}), so its plugins are left out; mend or uninstall that distribution",
                GradhooksWarning,
                stacklevel=2,
            )


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def _listed(points: list[EntryPoint]) -> str:
    return " and ".join(
        f"{_distribution(point)} {point.dist.version}" if point.dist is not None else _distribution(point)
        for point in points
    )


combinations = Registry("combination", "gradhooks.combinations", Combination)
accumulators = Registry("accumulator", "gradhooks.accumulators", Accumulator)

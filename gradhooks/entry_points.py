"""Read the entry points of installed distributions; nothing is imported."""

import os
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint, distributions, entry_points

from gradhooks.errors import GradhooksWarning

BUILT_IN = "gradhooks"
"""The distribution whose names take precedence."""


def entry_points_by_name(group: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points of a group by name; several distributions may use the same name."""
    by_name: dict[str, list[EntryPoint]] = {}
    for point in _entry_points(group):
        if distribution_of(point) == BUILT_IN or not plugins_disabled():
            others = by_name.setdefault(point.name, [])
            if all((other.value, distribution_of(other)) != (point.value, distribution_of(point)) for other in others):
                others.append(point)  # importlib.metadata lists a distribution once per place where it finds it
    return by_name


def plugins_disabled() -> bool:
    """Return whether the environment variable `GRADHOOKS_DISABLE_PLUGINS` hides other distributions."""
    return os.environ.get("GRADHOOKS_DISABLE_PLUGINS", "0") not in ("", "0")


def distribution_of(point: EntryPoint) -> str:
    """Return the name of the distribution that an entry point belongs to."""
    return "an unknown distribution" if point.dist is None else point.dist.name


def version_of(point: EntryPoint) -> str:
    """Return the version of that distribution."""
    return "?" if point.dist is None else point.dist.version


def describe(*points: EntryPoint) -> str:
    """Return names and versions of the distributions of some entry points, for messages."""
    return " and ".join(
        distribution_of(point) if point.dist is None else f"{distribution_of(point)} {version_of(point)}"
        for point in points
    )


def normalize(distribution: str) -> str:
    """Return the spelling of a distribution's name under which two spellings compare equal."""
    return distribution.lower().replace("_", "-")


def _entry_points(group: str) -> list[EntryPoint]:
    try:
        return list(entry_points(group=group))
    except Exception:  # one unreadable entry_points.txt, of any installed package, makes the whole call fail
        return list(_readable_entry_points(group))


def _readable_entry_points(group: str) -> Iterator[EntryPoint]:
    seen = set()
    for distribution in distributions():
        name = normalize(distribution.metadata["Name"] or "?")
        if name in seen:  # the first one along sys.path is the one that is imported
            continue
        seen.add(name)
        try:
            yield from distribution.entry_points.select(group=group)
        except Exception as error:
            warnings.warn(
                f"the entry_points.txt of {name} {distribution.version} cannot be read ({type(error).__name__}: "
                f"{error}), so its plugins are not available; repair or uninstall that distribution",
                GradhooksWarning,
                stacklevel=2,
            )

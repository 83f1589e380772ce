"""Read the entry points of installed distributions; no plugin is imported.

The metadata are read once in a process, and again when a name is missing, or when a directory on `sys.path` was added
or has changed. The built-in names do not depend on metadata, so no distribution can take their place.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distributions, entry_points, version
from typing import Any

from gradhooks.errors import GradhooksWarning
from gradhooks.first_party import BUILT_IN, GRADHOOKS, normalize

Places = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class PluginEntry:
    """The entry point of a plugin, and the distribution that it belongs to.

    Attributes:
        point: The entry point.
        distribution: The name of the distribution.
        version: Its version.
        built_in: Whether it is one of gradhooks itself, whose names take precedence.
    """

    point: EntryPoint
    distribution: str
    version: str
    built_in: bool = False

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    def belongs_to(self, distribution: str) -> bool:
        """Return whether this is the name of the distribution, in any spelling."""
        return normalize(self.distribution) == normalize(distribution)


Entries = dict[str, list[PluginEntry]]


class _Metadata:
    """What was last read, by group of entry points; empty if a directory has changed since."""

    def __init__(self) -> None:
        self._places: Places = ()
        self._by_group: dict[str, Entries] = {}

    def entries(self, group: str, *, anew: bool = False) -> Entries:
        places = _places()
        if anew or places != self._places:
            self._places, self._by_group = places, {}
        if group not in self._by_group:
            self._by_group[group] = _read(group)
        return self._by_group[group]


_metadata = _Metadata()


def entries_by_name(group: str) -> Entries:
    """Return the entry points of a group by name; several distributions may use the same name."""
    return {name: visible for name, entries in _metadata.entries(group).items() if (visible := _visible(entries))}


def entries_named(group: str, name: str) -> list[PluginEntry]:
    """Return the entry points with a name. If there is none, the metadata are read again first."""
    found = _visible(_metadata.entries(group).get(name, []))
    return found or _visible(_metadata.entries(group, anew=True).get(name, []))


@cache
def built_in_entry(group: str, name: str) -> PluginEntry | None:
    """Return the entry point of gradhooks itself that has a name; other distributions are not read."""
    value = BUILT_IN.get(group, {}).get(name)
    if value is None:
        return None
    try:
        number = version(GRADHOOKS)
    except PackageNotFoundError:
        number = "?"
    return PluginEntry(EntryPoint(name, value, group), GRADHOOKS, number, built_in=True)


def plugins_disabled() -> bool:
    """Return whether the environment variable `GRADHOOKS_DISABLE_PLUGINS` hides other distributions."""
    return os.environ.get("GRADHOOKS_DISABLE_PLUGINS", "0") not in ("", "0")


def _visible(entries: list[PluginEntry]) -> list[PluginEntry]:
    return [entry for entry in entries if entry.built_in] if plugins_disabled() else entries


def _places() -> Places:
    """Return the directories in which distributions are found, with the time of their last change."""
    return tuple((place, _changed(place or os.curdir)) for place in sys.path)


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _read(group: str) -> Entries:
    built_in = (built_in_entry(group, name) for name in BUILT_IN.get(group, {}))
    entries: Entries = {entry.point.name: [entry] for entry in built_in if entry is not None}
    for point in _entry_points(group):
        entry = PluginEntry(point, *_name_and_version(point.dist))
        if entry.belongs_to(GRADHOOKS):
            _warn_of_another_gradhooks(entry)
            continue
        others = entries.setdefault(point.name, [])
        if all((other.point.value, other.distribution) != (point.value, entry.distribution) for other in others):
            others.append(entry)  # importlib.metadata lists a distribution once per place where it finds it
    return entries


def _warn_of_another_gradhooks(entry: PluginEntry) -> None:
    if entry.point.value.partition(".")[0] != GRADHOOKS:
        warnings.warn(
            f"a distribution that calls itself {entry} provides {entry.point.name!r} from {entry.point.value!r}, which "
            "is no part of gradhooks, so this plugin is not available; rename or uninstall that distribution",
            GradhooksWarning,
            stacklevel=2,
        )


def _name_and_version(distribution: Distribution | None) -> tuple[str, str]:
    """Return name and version of a distribution, whose metadata may be missing or unreadable."""
    try:
        metadata: Any = None if distribution is None else distribution.metadata
        return metadata["Name"] or "an unknown distribution", metadata["Version"] or "?"
    except Exception:
        return "an unknown distribution", "?"


def _entry_points(group: str) -> list[EntryPoint]:
    try:
        return list(entry_points(group=group))
    except Exception:  # one unreadable entry_points.txt, of any installed package, makes the whole call fail
        return list(_readable_entry_points(group))


def _readable_entry_points(group: str) -> Iterator[EntryPoint]:
    seen = set()
    for distribution in distributions():
        name, number = _name_and_version(distribution)
        if normalize(name) in seen:  # the first one along sys.path is the one that is imported
            continue
        seen.add(normalize(name))
        try:
            yield from distribution.entry_points.select(group=group)
        except Exception as error:
            warnings.warn(
                f"the entry_points.txt of {name} {number} cannot be read ({type(error).__name__}: {error}), so its "
                "plugins are not available; repair or uninstall that distribution",
                GradhooksWarning,
                stacklevel=2,
            )

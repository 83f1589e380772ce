"""Names of combinations and accumulators, found through entry points.

Listing names imports nothing. A plugin is imported when its name is first used, so a broken plugin affects no other
name. Failures are not cached: after a repair the same call works.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from loguru import logger

from gradhooks.accumulators.base import Accumulator
from gradhooks.combination import Combination
from gradhooks.entry_points import (
    Entries,
    PluginEntry,
    built_in_entry,
    entries_by_name,
    entries_named,
    plugins_disabled,
)
from gradhooks.errors import PluginError
from gradhooks.first_party import first_party_provider
from gradhooks.plugin_options import check_options, describe_options, required_options, usage_example

Factory = TypeVar("Factory", bound=Callable[..., Any])
Plugin = TypeVar("Plugin")
Object = TypeVar("Object")

API_VERSION = 1
"""Version of both plugin contracts. A plugin class may state the version it was written for: `api_version = 1`."""


class Registry(Generic[Plugin]):
    """The names of one kind of plugin.

    Args:
        kind: What the plugins are, for messages.
        group: Their entry-point group.
        contract: The class of the objects that they create.
    """

    def __init__(self, kind: str, group: str, contract: type[Plugin]) -> None:
        self.kind = kind
        self.group = group
        self.contract = contract
        self._registered: dict[str, Callable[..., Any]] = {}
        self._loaded: dict[PluginEntry, Callable[..., Any]] = {}

    def available(self) -> list[str]:
        """Return every name, sorted; a name that several distributions provide as `distribution:name`.

        Built-in names win; a third-party plugin of the same name needs `distribution:name`.
        """
        names = {*self._registered}
        for name, entries in self.entries().items():
            preferred = _built_in(entries) or entries
            names.update([name] if len(preferred) == 1 else [])
            names.update(
                f"{entry.distribution}:{name}" for entry in entries if len(entries) > 1 and preferred != [entry]
            )
        return sorted(names)

    def entries(self) -> Entries:
        """Return the entry points by name; nothing is imported."""
        return entries_by_name(self.group)

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Name a class or function in this process only, as in a notebook; a later call replaces an earlier one.

        Raises:
            PluginError: An installed distribution provides that name.
        """

        def decorate(factory: Factory) -> Factory:
            entries = entries_named(self.group, name)
            if entries:
                raise PluginError(
                    f"{self.kind} {name!r} is already provided by {_joined(entries)}; choose another name"
                )
            self._registered[name] = factory
            return factory

        return decorate

    def load(self, name: str) -> Callable[..., Any]:
        """Return the class or function that a name stands for, and import it if necessary.

        Args:
            name: `name`, or `distribution:name` if several distributions provide it.

        Raises:
            PluginError: No plugin has the name, several have it, or the plugin cannot be imported.
        """
        if name in self._registered:
            return self._registered[name]
        entry = self._find(name)
        if entry not in self._loaded:
            self._loaded[entry] = self._import(entry)
        return self._loaded[entry]

    def create(self, name: str, **options: Any) -> Plugin:
        """Create an object of the plugin that a name stands for.

        Raises:
            PluginError: As for `load`; or the options do not fit.
        """
        factory = self.load(name)
        if options or required_options(factory):
            check_options(
                self._origin(name),
                factory,
                options,
                usage_example(self.kind, name, factory, [entry.point for entry in self.find(name)]),
            )
        try:
            plugin = factory(**options)
        except TypeError as error:
            raise PluginError(
                f"{self._origin(name)} cannot be created with options {options}: {error}. It takes "
                f"{describe_options(factory)}"
            ) from error
        if not isinstance(plugin, self.contract):
            raise PluginError(
                f"{self.kind} {name!r} must create a gradhooks {self.contract.__name__}, but created {plugin!r}"
            )
        return plugin

    def resolve(self, plugin: str | Object, options: Mapping[str, Any] | None = None) -> Plugin | Object:
        """Return the object for a name; return any other callable, or object of this kind, unchanged.

        Args:
            plugin: A name or an object.
            options: The options with which the object for a name is created.

        Raises:
            PluginError: As for `create`.
            TypeError: It is neither a name nor such an object; or options are given for an object.
        """
        if isinstance(plugin, str):
            return self.create(plugin, **(options or {}))
        if isinstance(plugin, type) or not (callable(plugin) or isinstance(plugin, self.contract)):
            raise TypeError(f"{self.kind} must be a name or an object (an instance, not a class), got {plugin!r}")
        if options:
            raise TypeError(
                f"{self.kind}_options are for a {self.kind} that is given by its name; pass "
                f"{', '.join(options)} to the constructor of {plugin!r}"
            )
        return plugin

    def find(self, name: str) -> list[PluginEntry]:
        """Return the entry points of `distribution:name`, or of `name`: the built-in one alone if there is one."""
        distribution, _, short = name.rpartition(":")
        own = built_in_entry(self.group, short)
        if own is not None and (not distribution or own.belongs_to(distribution)):
            return [own]
        entries = entries_named(self.group, short)
        return [entry for entry in entries if not distribution or entry.belongs_to(distribution)]

    def has(self, name: str) -> bool:
        """Return whether a plugin has this name; nothing is imported."""
        return name in self._registered or bool(self.find(name))

    def _find(self, name: str) -> PluginEntry:
        entries = self.find(name)
        if not entries:
            raise PluginError(unknown_name(name, self))
        if len(entries) > 1:
            choices = " or ".join(repr(f"{entry.distribution}:{name}") for entry in entries)
            raise PluginError(f"{self.kind} {name!r} is provided by {_joined(entries)}; use {choices}")
        return entries[0]

    def _import(self, entry: PluginEntry) -> Callable[..., Any]:
        point = entry.point
        origin = f"{self.kind} {point.name!r} of {entry}"
        try:
            if not point.pattern.match(point.value):
                raise ValueError(f"the value of an entry point must be 'module:object', not {point.value!r}")
            loaded = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module may call sys.exit() when it is imported
            raise PluginError(
                f"{origin} cannot be imported from {point.value!r}: {describe_error(error)}. "
                f"Repair or uninstall that distribution"
            ) from error
        self._validate(loaded, point.value, origin)
        logger.debug("loaded {} {!r} of {}", self.kind, point.name, entry)
        return loaded  # type: ignore[no-any-return]

    def _validate(self, loaded: Any, value: str, origin: str) -> None:
        if not callable(loaded) or (isinstance(loaded, type) and not issubclass(loaded, self.contract)):
            raise PluginError(
                f"{origin} is {loaded!r}; its entry point {value!r} must name a subclass of gradhooks' "
                f"{self.contract.__name__}, or a function that creates such an object"
            )
        written_for = getattr(loaded, "api_version", API_VERSION)
        if written_for != API_VERSION:
            raise PluginError(
                f"{origin} was written for version {written_for} of the plugin contract, this gradhooks has version "
                f"{API_VERSION}; install matching versions of the two"
            )

    def _origin(self, name: str) -> str:
        """Return the kind, the name and the distribution of a plugin, for messages."""
        entries = self.find(name)
        return f"{self.kind} {name!r} {f'of {entries[0]}' if entries else 'registered in this process'}"


def unknown_name(name: str, *registries: Registry[Any]) -> str:
    """Return a message that says where a name could come from: another distribution, or a similar name."""
    kind = " or ".join(registry.kind for registry in registries)
    names = sorted({name for registry in registries for name in registry.available()})
    if plugins_disabled():
        hint = "; GRADHOOKS_DISABLE_PLUGINS hides the plugins of other distributions"
    else:
        provider = first_party_provider(name)
        if provider:
            return f"{name!r} is provided by {provider}"
        hint = ""
    closest = difflib.get_close_matches(name, names, n=1)
    suggestion = f": did you mean {closest[0]!r}?" if closest else "."
    return f"unknown {kind} {name!r}{suggestion} Available: {', '.join(names)}{hint}"


def describe_error(error: BaseException) -> str:
    """Return class and message of an error of a plugin, whose message may itself raise."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _built_in(entries: list[PluginEntry]) -> list[PluginEntry]:
    return [entry for entry in entries if entry.built_in]


def _joined(entries: list[PluginEntry]) -> str:
    return " and ".join(map(str, entries))


combinations = Registry("combination", "gradhooks.combinations", Combination)
accumulators = Registry("accumulator", "gradhooks.accumulators", Accumulator)  # type: ignore[type-abstract]


def resolve_combination(combination: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Return what `combinations.resolve` returns; None stands for no combination and has no options."""
    return None if combination is None and not options else combinations.resolve(combination, options)

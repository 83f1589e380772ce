"""The options of a plugin: the parameters of the class or function that its name stands for."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

from torch import nn

from gradhooks.errors import PluginError


def required_options(factory: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters without a default."""
    return [each.name for each in _named_parameters(factory) if each.default is each.empty]


def describe_options(factory: Callable[..., Any]) -> str:
    """Return the parameters with their defaults, for messages, such as `features, hidden=128`."""
    shown = [
        each.name if each.default is each.empty else f"{each.name}={each.default!r}"
        for each in _named_parameters(factory)
    ]
    if _takes_any_option(factory):
        shown.append("any other option")
    return ", ".join(shown) or "no options"


def check_options(origin: str, factory: Callable[..., Any], options: Mapping[str, Any], remedy: str) -> None:
    """Refuse options that the plugin does not take, and a lack of those that it needs.

    Args:
        origin: The plugin and its distribution, for messages.
        factory: The class or function.
        options: The options by their names.
        remedy: How to pass what is missing.

    Raises:
        PluginError: It names the plugin, its distribution, and the options that it takes.
    """
    known = [each.name for each in _named_parameters(factory)]
    for name in options:
        if name not in known and not _takes_any_option(factory):
            closest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {closest[0]!r}?" if closest else "."
            raise PluginError(f"{origin} has no option {name!r}{hint} It takes {describe_options(factory)}")
    missing = [name for name in required_options(factory) if name not in options]
    if missing:
        raise PluginError(
            f"{origin} needs options: {', '.join(missing)}. It takes {describe_options(factory)}. {remedy}"
        )


def usage_example(kind: str, name: str, factory: Callable[..., Any], points: Sequence[EntryPoint]) -> str:
    """Return code that passes the required options of a plugin to `MultiPose`.

    Args:
        kind: "combination" or "accumulator".
        name: The name of the plugin.
        factory: The class or function.
        points: Its entry points; empty if it was registered in this process.
    """
    required = required_options(factory)
    class_name = getattr(factory, "__name__", name)
    created = f"{class_name}({', '.join(f'{option}=...' for option in required)})"
    imported = f"from {points[0].module} import {points[0].attr}; " if points else ""
    if kind == "combination":
        by_name = ", ".join(f"{option!r}: ..." for option in required)
        return f"Pass combination_options={{{by_name}}}, or an object: {imported}MultiPose(model, {created})"
    return f"Pass an object instead of the name: {imported}MultiPose(model, {kind}={created})"


def _named_parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each for each in _parameters(factory) if each.kind in named]


def _takes_any_option(factory: Callable[..., Any]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in _parameters(factory))


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    if getattr(factory, "__init__", None) is nn.Module.__init__:
        return []  # its signature is (*args, **kwargs), and it refuses both
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have no signature, and may take anything
        return [inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)]

"""Describe combinations by strings that are the same in every process."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))


def describe_function(function: Any) -> str:
    """Return a description of a combination: its class and options, or the code and constants of a function."""
    if function is None:
        return "None"
    if isinstance(function, functools.partial):
        keywords = {name: _plain(value) for name, value in function.keywords.items()}
        return f"partial({describe_function(function.func)}, {list(map(_plain, function.args))}, {keywords})"
    if inspect.ismethod(function):
        return f"{describe_function(function.__self__)}.{function.__name__}"
    if inspect.isfunction(function):
        return _describe_code(function)
    if isinstance(function, nn.Module):
        return "; ".join(f"{path} {_describe_object(module)}".lstrip() for path, module in function.named_modules())
    return _describe_object(function)


def _describe_object(instance: Any) -> str:
    kind: Any = type(instance)
    options = {name: _plain(value) for name in _option_names(kind) if (value := _attribute(instance, name)) is not None}
    shown = ""
    if isinstance(instance, nn.Module) and not instance._parameters:  # the values of parameters are compared elsewhere
        shown = _without_addresses(instance.extra_repr())
    return f"{kind.__module__}.{kind.__qualname__} with options {options} {shown}".rstrip()


def _describe_code(function: Callable[..., Any]) -> str:
    code: Any = getattr(function, "__code__")  # noqa: B009 - typed as any callable
    captured = [_plain(_content(cell)) for cell in getattr(function, "__closure__", None) or ()]
    constants = [_plain(constant) for constant in code.co_consts]
    details = f"{code.co_names} {constants} {captured} {[_plain(each) for each in function.__defaults__ or ()]}"
    return f"{function.__module__}.{function.__qualname__} {details} {code.co_code.hex()[:64]}"


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


@functools.cache
def _option_names(kind: Any) -> list[str]:
    try:
        return list(inspect.signature(kind).parameters)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return []


def _attribute(instance: object, name: str) -> object:
    """Return the attribute in which an option is by convention; None if it is not a plain value."""
    value = vars(instance).get(name, vars(instance).get(f"_{name}")) if hasattr(instance, "__dict__") else None
    return value if isinstance(value, _PLAIN) else None


def _plain(value: object) -> str:
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)

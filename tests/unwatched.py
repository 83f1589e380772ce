"""A place for what tests record inside of models: second runs restore what modules and their objects hold."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any


class Unwatched:
    """An object whose values are in a closure, so that nobody looks into it."""

    __slots__ = ("_values",)
    _values: Callable[[], dict[str, Any]]

    def __init__(self, **values: Any) -> None:
        object.__setattr__(self, "_values", lambda: values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values()[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._values()[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unwatched":
        return Unwatched(**copy.deepcopy(self._values(), memo))

    def __reduce__(self) -> Any:
        return partial(Unwatched, **self._values()), ()

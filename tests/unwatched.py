"""A place for what tests record inside of models: second runs restore the attributes of modules."""

from typing import Any


class Unwatched:
    """An object that is neither a module nor a container, so that nobody looks into it."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

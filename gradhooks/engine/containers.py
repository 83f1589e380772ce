"""Containers of Python: read their contents, and put contents back into the same container."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple


class ContainerRecord(NamedTuple):
    """The contents of a container at one time.

    Attributes:
        target: A dict, list, set or deque.
        keys: The keys of a dict, else None.
        items: The values of a dict, else the items. `LeftAsIs` and weak references stand for what is not recorded.
        skipped: Keys that are none of ours.
    """

    target: Any
    keys: tuple[Any, ...] | None
    items: tuple[Any, ...]
    skipped: frozenset[str] = frozenset()

    def views(self) -> list[Iterable[Any]]:
        """Return iterables over what to watch. Names of attributes are not: their number and values suffice."""
        if self.keys is None:
            return [self.target]
        return [self.target.values()] if self.skipped else [self.target.values(), self.target]

    def restore(self) -> None:
        """Put the contents back, into the same container, so that its aliases stay valid."""
        base = base_of(self.target)
        if self.keys is not None:
            _restore_dict(base, self.target, dict(zip(self.keys, self.items, strict=True)), self.skipped)
            return
        items = [item for item in map(resolve, self.items) if item is not LEFT_AS_IS]
        base.clear(self.target)
        (base.update if base is set else base.extend)(self.target, items)


class GraphReference:
    """Stands for a tensor that has a graph, which a snapshot must not keep alive."""

    __slots__ = ("get",)

    def __init__(self, get: Any) -> None:
        self.get = get


LEFT_AS_IS = object()  # stands for a value that cannot be restored


def resolve(item: Any) -> Any:
    """Return the value for which a recorded item stands; `LEFT_AS_IS` if it is gone."""
    if type(item) is not GraphReference:
        return item
    value = item.get()
    return LEFT_AS_IS if value is None else value


def base_of(container: object) -> Any:
    """Return the standard type whose methods read and write a container; None if it is no container."""
    return next((base for base in (OrderedDict, dict, list, set, deque) if isinstance(container, base)), None)


def _restore_dict(base: Any, target: Any, values: dict[Any, Any], skipped: frozenset[str]) -> None:
    # A key keeps its place where it can: only an OrderedDict shows another order, and only after a change of keys.
    kept = [key for key in target if key not in skipped]
    if kept != list(values) and not skipped:
        present = {key: target[key] for key in kept}
        base.clear(target)
        kept = []
    else:
        present = target
    for key in kept:
        if key not in values:
            base.__delitem__(target, key)
    for key, item in values.items():
        value = resolve(item)
        if value is not LEFT_AS_IS:
            base.__setitem__(target, key, value)
        elif key in present:
            base.__setitem__(target, key, present[key])

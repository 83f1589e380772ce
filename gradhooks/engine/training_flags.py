"""Training flags of modules: run a block under other ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

TrainingFlags = list[tuple[nn.Module, bool]]


@contextmanager
def with_training_flags(flags: Iterable[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Set training flags for the block and restore them afterwards."""
    changed = [(module, module.training) for module, training in flags if module.training != training]
    try:
        for module, before in changed:
            module.training = not before
        yield
    finally:
        for module, before in changed:
            module.training = before

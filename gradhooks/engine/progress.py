"""Telling the user how far a long group is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Progress = bool | Callable[[int, int], object]


def _say_nothing(done: int) -> None:
    del done


@contextmanager
def reporting(progress: Progress, total: int, doing: str) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of poses that are done.

    Args:
        progress: True for a bar where tqdm is installed, False for nothing, or a function of `(done, total)`.
        total: How many poses there are to do.
        doing: What is done with them, for the bar.
    """
    if callable(progress):
        yield lambda done: progress(done, total)
    elif progress and find_spec("tqdm") is not None:
        from tqdm.auto import tqdm  # noqa: PLC0415 - optional, and slow to import

        with tqdm(total=total, desc=doing, unit="pose", leave=False) as bar:
            yield lambda done: bar.update(done - bar.n)
    else:
        yield _say_nothing

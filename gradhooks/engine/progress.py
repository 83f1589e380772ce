"""Report how many poses of a batch are done: a tqdm bar, or a function of the user."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradhooks.options import Progress


@contextmanager
def progress_of(progress: Progress, total: int, action: str, *, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Yield a function to be called with the number of poses that are done.

    Args:
        progress: The option `progress`.
        total: The number of poses.
        action: What is done with them, shown beside the bar.
        done: How many of them are done when the block begins.
    """
    if callable(progress):
        yield lambda done: progress(done, total)
    elif progress:
        from tqdm.auto import tqdm  # noqa: PLC0415 - optional, and slow to import

        with tqdm(total=total, initial=done, desc=action, unit="pose", leave=False) as bar:
            yield lambda done: bar.update(done - bar.n)
    else:
        yield _ignore


def _ignore(done: int) -> None:
    del done

"""Report how many poses of a batch are done: a tqdm bar, or a function of the user."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from gradhooks.options import Progress


def progress_of(
    progress: Progress, total: int, action: str, *, done: int = 0
) -> AbstractContextManager[Callable[[int], object]]:
    """Return a context whose block gets a function to be called with the number of poses that are done.

    Args:
        progress: The option `progress`.
        total: The number of poses.
        action: What is done with them, shown beside the bar.
        done: How many of them are done when the block begins.
    """
    if callable(progress):
        return nullcontext(lambda done: progress(done, total))
    return _bar(total, done, action) if progress else _SILENT


@contextmanager
def _bar(total: int, done: int, action: str) -> Iterator[Callable[[int], object]]:
    from tqdm.auto import tqdm  # noqa: PLC0415 - optional, and slow to import

    with tqdm(total=total, initial=done, desc=action, unit="pose", leave=False) as bar:
        yield lambda done: bar.update(done - bar.n)


def _ignore(done: int) -> None:
    del done


_SILENT = nullcontext(_ignore)

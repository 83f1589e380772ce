"""Report how many poses of a group are done: a tqdm bar, or a function of the user."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Progress = bool | Callable[[int, int], object]


def check_progress(progress: Progress) -> None:
    """Check the value of the option `progress`.

    Raises:
        TypeError: It is neither a bool nor callable.
        ModuleNotFoundError: It is True and tqdm is not installed.
    """
    if not (isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be a bool or a function of (done, total), got {progress!r}")
    if progress is True and find_spec("tqdm") is None:
        raise ModuleNotFoundError(
            "progress=True shows a bar of tqdm, which is not installed: pip install tqdm, or pass a function of "
            "(done, total)",
            name="tqdm",
        )


@contextmanager
def progress_of(progress: Progress, total: int, action: str) -> Iterator[Callable[[int], object]]:
    """Yield a function to be called with the number of poses that are done.

    Args:
        progress: The option `progress`.
        total: The number of poses.
        action: What is done with them, shown beside the bar.
    """
    if callable(progress):
        yield lambda done: progress(done, total)
    elif progress:
        from tqdm.auto import tqdm  # noqa: PLC0415 - optional, and slow to import

        with tqdm(total=total, desc=action, unit="pose", leave=False) as bar:
            yield lambda done: bar.update(done - bar.n)
    else:
        yield _ignore


def _ignore(done: int) -> None:
    del done

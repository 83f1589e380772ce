"""How a check says what is wrong."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from gradhooks.errors import GradhooksError

Check = Callable[[Any], None]


class ConformanceError(GradhooksError, AssertionError):
    """Mend the plugin: a check of the conformance kit failed."""


class CheckFailed(Exception):  # noqa: N818 - never leaves the kit
    """What a check found; `named` adds which check and which plugin."""


def name_of(plugin: Any) -> str:
    """For messages and test ids."""
    return getattr(plugin, "__name__", type(plugin).__name__)


def named(check: Check) -> Check:
    """Make every way in which a check can fail a `ConformanceError` that names check and plugin.

    Checks draw from the global random source, which is left as it was.
    """

    @functools.wraps(check)
    def run(plugin: Any) -> None:
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                check(plugin)
        except CheckFailed as found:
            raise ConformanceError(f"{check.__name__}: {name_of(plugin)} {found}") from found.__cause__
        except Exception as fault:
            raise ConformanceError(
                f"{check.__name__}: {name_of(plugin)} raised {type(fault).__name__}: {fault}. What this check asks: "
                f"{check.__doc__}"
            ) from fault

    return run

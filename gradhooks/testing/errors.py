"""How a conformance check reports a failure."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from gradhooks.errors import GradhooksError

Check = Callable[[Any], None]


class ConformanceError(GradhooksError, AssertionError):
    """Repair the plugin: a check of the conformance kit failed."""


class CheckFailed(Exception):  # noqa: N818 - never leaves the kit
    """Describe a failure inside a check; `conformance_check` adds the names of the check and of the plugin."""


def name_of(plugin: Any) -> str:
    """Return the name of a plugin for messages and test ids."""
    return getattr(plugin, "__name__", type(plugin).__name__)


def conformance_check(check: Check) -> Check:
    """Decorate a check: every failure becomes a `ConformanceError` that names the check and the plugin.

    The check runs with a fixed seed of PyTorch's CPU generator, whose state is restored afterwards.
    """

    @functools.wraps(check)
    def run(plugin: Any) -> None:
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                check(plugin)
        except CheckFailed as failure:
            raise ConformanceError(f"{check.__name__}: {name_of(plugin)} {failure}") from failure.__cause__
        except Exception as error:
            raise ConformanceError(
                f"{check.__name__}: {name_of(plugin)} raised {type(error).__name__}: {error}. The check requires: "
                f"{check.__doc__}"
            ) from error

    return run

"""`torch.nn.utils.parametrize.cached()` around a step: its global cache and intercepted poses.

What is cached has a graph, which all poses would share, and belongs to the user's parameters. While shadows are in the
model nothing is cached: each pose computes its parametrizations, and the gradients add up to the same sum. This does
not hold for a parametrization that changes state or draws random numbers, which would do so for each pose.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from gradhooks.engine.model_state import ModelState
from gradhooks.errors import ReplayError


@contextmanager
def uncached_parametrizations() -> Iterator[None]:
    """Run the block with an empty cache that is not used."""
    if not parametrize._cache_enabled:
        yield
        return
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache


def refuse_cached_state(model: nn.Module, state: ModelState) -> None:
    """Refuse parametrizations for which it matters how often they are computed, while they are cached.

    Raises:
        ReplayError: One changes its state, as `spectral_norm` does in training, or draws random numbers.
    """
    if not parametrize._cache_enabled:
        return
    for path, module in model.named_modules():
        for name in getattr(module, "parametrizations", {}) if parametrize.is_parametrized(module) else ():
            with uncached_parametrizations(), torch.no_grad(), state.preserved() as before:
                getattr(module, name)
                if state.unchanged_since(before):
                    continue
            raise ReplayError(
                f"the parametrization of {f'{path}.{name}'.lstrip('.')} changes state or draws random numbers each "
                "time that it is computed, and gradhooks computes it for each pose although it is cached; leave "
                "parametrize.cached() out, or allow the memory for plain chunks with memory="
            )

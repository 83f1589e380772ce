"""Read and write the state of every kind of random number generator through one pair of functions."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RandomSource(NamedTuple):
    """How the state of a generator is read (`get`) and written (`set`)."""

    get: Callable[[], Any]
    set: Callable[[Any], object]

    def read_if_changed(self, known: Any) -> Any:
        """Return the state, or the object `known` itself if it is unchanged (detected for tensor states only)."""
        state = self.get()
        return known if isinstance(known, Tensor) and torch.equal(known, state) else state


def default_source(device: torch.device) -> RandomSource:
    """Return the default generator of PyTorch on a device."""
    if device.type == "cpu":
        # Viewed as int64, 5 kB compare six times faster than as uint8.
        return RandomSource(
            lambda: torch.get_rng_state().view(torch.int64), lambda state: torch.set_rng_state(state.view(torch.uint8))
        )
    backend = torch.get_device_module(device)
    return RandomSource(lambda: backend.get_rng_state(device), lambda state: backend.set_rng_state(state, device))


def user_sources(generators: Iterable[object]) -> list[RandomSource]:
    """Return the sources of the option `generators`.

    Args:
        generators: `torch.Generator`, `numpy.random.Generator` or `RandomState`, `random.Random`, or the modules
            `random` and `numpy.random` for their global generators.

    Raises:
        TypeError: An object is none of these.
    """
    return [_user_source(generator) for generator in generators]


def _user_source(generator: Any) -> RandomSource:
    bits = getattr(generator, "bit_generator", None)
    if bits is not None and hasattr(bits, "state"):  # numpy.random.Generator
        return RandomSource(lambda: bits.state, lambda state: setattr(bits, "state", state))
    for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
        if hasattr(generator, get) and hasattr(generator, put):
            return RandomSource(getattr(generator, get), getattr(generator, put))
    raise TypeError(
        "generators takes generators of torch, numpy or random, or the modules random and numpy.random; got "
        f"{generator!r}"
    )

"""Whatever random numbers can come from, behind one pair of functions."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RandomSource(NamedTuple):
    """How the state of a random source is read and written."""

    get: Callable[[], Any]
    set: Callable[[Any], object]

    def newest(self, known: Any) -> Any:
        """The state; the very object `known` where that is seen to be it, which not every source lets anybody see."""
        state = self.get()
        return known if isinstance(known, Tensor) and torch.equal(known, state) else state


def sources_in_use(devices: Iterable[torch.device], generators: Iterable[object]) -> list[RandomSource]:
    """PyTorch's default generators of some devices, then the user's own generators.

    Args:
        devices: The devices.
        generators: `torch.Generator`, `numpy.random.Generator` or `RandomState`, `random.Random`, or the modules
            `random` and `numpy.random` for their global ones.

    Raises:
        TypeError: Something else is among them.
    """
    return [*map(_default_generator, devices), *map(_source, generators)]


def _default_generator(device: torch.device) -> RandomSource:
    if device.type == "cpu":
        # 5 kB in words, of which equality is known six times as fast as of bytes.
        return RandomSource(
            lambda: torch.get_rng_state().view(torch.int64), lambda state: torch.set_rng_state(state.view(torch.uint8))
        )
    backend = torch.get_device_module(device)
    return RandomSource(lambda: backend.get_rng_state(device), lambda state: backend.set_rng_state(state, device))


def _source(generator: Any) -> RandomSource:
    bits = getattr(generator, "bit_generator", None)
    if bits is not None and hasattr(bits, "state"):  # numpy.random.Generator
        return RandomSource(lambda: bits.state, lambda state: setattr(bits, "state", state))
    for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
        if hasattr(generator, get) and hasattr(generator, put):
            return RandomSource(getattr(generator, get), getattr(generator, put))
    raise TypeError(
        f"generators takes generators of torch, numpy or random (or the modules random and numpy.random), got "
        f"{generator!r}"
    )

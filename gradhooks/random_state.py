"""Read and write the state of every kind of random number generator through one pair of functions."""

import ctypes
import functools
import random
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class RandomSource(NamedTuple):
    """How the state of a generator is read (`get`) and written (`set`).

    Attributes:
        get: Returns the state.
        set: Sets the state.
        is_still: Returns whether a state that was read before is that of now, where this costs less than reading it
            again. False means unknown.
        costly: Whether reading takes longer than 10 us.
    """

    get: Callable[[], Any]
    set: Callable[[Any], object]
    is_still: Callable[[Any], bool] = lambda _: False
    costly: bool = False

    def read_if_changed(self, known: Any) -> Any:
        """Return the state, or the object `known` itself if it is unchanged."""
        if known is not None and self.is_still(known):
            return known
        state = self.get()
        return known if same_state(known, state) else state


def default_source(device: torch.device) -> RandomSource:
    """Return the default generator of PyTorch on a device."""
    if device.type == "cpu":
        return RandomSource(torch.get_rng_state, torch.set_rng_state)
    backend = torch.get_device_module(device)
    return RandomSource(
        lambda: backend.get_rng_state(device), lambda state: backend.set_rng_state(state, device), costly=True
    )


def global_sources() -> list[RandomSource]:
    """Return the global generators of Python and, if it is imported, of numpy."""
    sources = [_python_source(cast("Any", random.getstate).__self__, costly=True)]
    if "numpy.random" in sys.modules:
        sources.append(_legacy_source(sys.modules["numpy.random"].get_state.__self__))
    return sources


def generator_source(generator: Any) -> RandomSource | None:
    """Return the source of a generator of torch, numpy or Python; None for any other object.

    Args:
        generator: `torch.Generator`, `numpy.random.Generator` or `RandomState`, or `random.Random`.
    """
    if isinstance(generator, torch.Generator):
        return RandomSource(generator.get_state, generator.set_state)
    if isinstance(generator, random.Random):
        return _python_source(generator)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        if isinstance(generator, numpy_random.Generator):
            bits = generator.bit_generator
            return RandomSource(lambda: bits.state, lambda state: setattr(bits, "state", state))
        if isinstance(generator, numpy_random.RandomState):
            return _legacy_source(generator)
    return None


def user_sources(generators: Iterable[object]) -> list[RandomSource]:
    """Return the sources of the option `generators`.

    Args:
        generators: Those of `generator_source`, objects with the same methods, or the modules `random` and
            `numpy.random` for their global generators.

    Raises:
        TypeError: An object is none of these.
    """
    return [_user_source(generator) for generator in generators]


def _user_source(generator: Any) -> RandomSource:
    source = generator_source(generator)
    if source is not None:
        return source
    for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
        if hasattr(generator, get) and hasattr(generator, put):
            return RandomSource(getattr(generator, get), getattr(generator, put))
    raise TypeError(
        "generators takes generators of torch, numpy or random, or the modules random and numpy.random; got "
        f"{generator!r}"
    )


class _PythonState(NamedTuple):
    """The state of a `random.Random`, and the bytes of its Mersenne twister."""

    state: Any
    twister: bytes


class _LegacyState(NamedTuple):
    """The state of a `numpy.random.RandomState`, and the bytes of its Mersenne twister."""

    state: Mapping[str, Any]
    twister: bytes


_TWISTER_BYTES = 4 * 624 + 4  # the key and the position


def _python_source(generator: random.Random, *, costly: bool = False) -> RandomSource:
    twister = _twister_of(generator)
    if twister is None:
        return RandomSource(generator.getstate, generator.setstate, costly=costly)

    # Reading and comparing the state takes 16 us, looking at the memory of the twister 0.1 us. The generator, and its
    # memory, live as long as these functions.
    def is_still(known: _PythonState) -> bool:
        return twister.raw == known.twister and bool(generator.gauss_next == known.state[-1])  # type: ignore[attr-defined]

    return RandomSource(
        lambda: _PythonState(generator.getstate(), twister.raw),
        lambda known: generator.setstate(known.state),
        is_still,
        costly,
    )


def _twister_of(generator: random.Random) -> Any:
    """Return the memory of the twister of a generator; None where it is not where CPython has it."""
    of_python = type(generator).getstate is random.Random.getstate and hasattr(generator, "gauss_next")
    if not (of_python and _has_layout_of_cpython()):
        return None
    return (ctypes.c_char * _TWISTER_BYTES).from_address(id(generator) + object.__basicsize__)


@functools.cache
def _has_layout_of_cpython() -> bool:
    """Return whether a `random.Random` begins with the position and the key of its twister."""
    base = random.Random.__base__
    if base is None or base.__basicsize__ < object.__basicsize__ + _TWISTER_BYTES:
        return False
    generator = random.Random(0)  # noqa: S311 - not for secrets
    _, (*key, position), _ = generator.getstate()
    expected = struct.pack(f"={1 + len(key)}I", position, *key)
    return ctypes.string_at(id(generator) + object.__basicsize__, _TWISTER_BYTES) == expected


def _legacy_source(generator: Any) -> RandomSource:
    bits = generator._bit_generator
    if type(bits).__name__ != "MT19937":
        return RandomSource(generator.get_state, generator.set_state)
    # Reading the state takes 40 us, looking at the memory of the twister 0.1 us.
    twister = (ctypes.c_char * _TWISTER_BYTES).from_address(bits.ctypes.state_address)

    def is_still(known: _LegacyState) -> bool:
        # A stored second normal number can be used up without a draw; it cannot appear without one.
        return twister.raw == known.twister and not known.state["has_gauss"]

    return RandomSource(
        lambda: _LegacyState(generator.get_state(legacy=False), twister.raw),
        lambda known: generator.set_state(known.state),
        is_still,
    )


def _as_int64(state: Tensor) -> Tensor:
    return state.view(torch.int64) if state.nbytes % torch.int64.itemsize == 0 else state


def same_state(one: Any, other: Any) -> bool:
    """Return whether two states of a generator are equal."""
    if isinstance(one, Tensor):
        # Viewed as int64, 5 kB compare six times faster than as uint8.
        return isinstance(other, Tensor) and torch.equal(_as_int64(one), _as_int64(other))
    if isinstance(one, _LegacyState):
        return isinstance(other, _LegacyState) and one.twister == other.twister and same_state(one.state, other.state)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and all(same_state(value, other.get(key)) for key, value in one.items())
    if hasattr(one, "tobytes"):  # an array of numpy
        return hasattr(other, "tobytes") and bool(one.tobytes() == other.tobytes())
    if isinstance(one, tuple) and isinstance(other, tuple) and any(hasattr(part, "tobytes") for part in one):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)

"""Read and write numbers of bytes and seconds with their units."""

import re
from collections.abc import Sequence

BYTE_UNITS = (("B", 1.0), ("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30))
PARSED_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SECOND_UNITS = (("us", 1e-6), ("ms", 1e-3), ("s", 1.0))


def parse_bytes(memory: str | float) -> int | float:
    """Return a number of bytes as an int, or a fraction of some memory as a float.

    >>> parse_bytes("1.5KiB")
    1536

    Raises:
        ValueError: `memory` is neither a number of bytes, nor a string such as `"2GiB"`, nor a float from 0 to 1.
    """
    if isinstance(memory, str) and memory.strip().isdecimal():  # from a command line
        return int(memory)
    if isinstance(memory, str):
        written = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", memory.strip())
        if written is not None and written[2] in PARSED_UNITS:
            return int(float(written[1]) * PARSED_UNITS[written[2]])
    elif isinstance(memory, float):
        if 0 <= memory <= 1:
            return memory
    elif isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
        return memory
    raise ValueError(
        f"memory must be a number of bytes (2_000_000), a string ('2GiB') or a fraction of the free memory (0.5), got "
        f"{memory!r}; units are {', '.join(PARSED_UNITS)}"
    )


def format_bytes(count: float) -> str:
    """Return a number of bytes in B, KiB, MiB or GiB with three digits.

    >>> format_bytes(1536)
    '1.50 KiB'
    """
    if abs(count) < 2.0**10:
        return f"{count:.0f} B"
    return _format(count, BYTE_UNITS)


def format_seconds(seconds: float) -> str:
    """Return a time in us, ms or s with three digits.

    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    return _format(seconds, SECOND_UNITS)


def _format(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Use the largest unit of which `value`, rounded to three digits, is at least one; else the smallest."""
    unit, size = next(((unit, size) for unit, size in reversed(units) if abs(value) >= 0.9995 * size), units[0])
    scaled = value / size
    decimals = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0  # noqa: PLR2004 - where rounding adds a digit
    return f"{scaled:.{decimals}f} {unit}"

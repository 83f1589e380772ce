"""Write bytes and seconds with the unit that fits."""

from collections.abc import Sequence

BYTE_UNITS = (("B", 1.0), ("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30))
SECOND_UNITS = (("us", 1e-6), ("ms", 1e-3), ("s", 1.0))


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

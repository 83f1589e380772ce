"""Bytes and seconds are written with the unit that fits."""

import pytest

from gradhooks.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (12_345, "12.1 KiB"),
        (200_000, "195 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (2**20, "1.00 MiB"),
        (500 * 2**20, "500 MiB"),
        (2**30, "1.00 GiB"),
        (2**41, "2048 GiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_bytes(count: int, expected: str) -> None:
    assert format_bytes(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0.00 us"),
        (3.2e-7, "0.32 us"),
        (9.999e-6, "10.0 us"),
        (4.56e-5, "45.6 us"),
        (9.9999e-4, "1.00 ms"),
        (0.00123, "1.23 ms"),
        (0.0999, "99.9 ms"),
        (0.0123, "12.3 ms"),
        (0.09997, "100 ms"),
        (0.9999, "1.00 s"),
        (75.3, "75.3 s"),
        (1234.0, "1234 s"),
        (-0.0314, "-31.4 ms"),
    ],
)
def test_seconds(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


def test_bytes_of_a_command_line() -> None:
    assert [parse_bytes(text) for text in ("0", "2048", "1.5KiB", "2 GiB")] == [0, 2048, 1536, 2**31]

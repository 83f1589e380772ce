"""Bytes: what a user allows, what a device has left, and how running out of memory is recognized."""

import os
import re

import torch

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

_OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "not enough memory", "out of memory", "ALLOC_FAILED")


def check_memory(memory: str | float) -> None:
    """Check the value of the option `memory`.

    Raises:
        ValueError: It is neither a number of bytes, nor a string such as `"2GiB"`, nor a fraction between 0 and 1.
    """
    _parse(memory)


def memory_in_bytes(memory: str | float, device: torch.device) -> int:
    """Return the bytes that `memory` stands for; a fraction is relative to the free memory of `device` now.

    Raises:
        ValueError: As for `check_memory`.
    """
    parsed = _parse(memory)
    return int(parsed * free_bytes(device)) if isinstance(parsed, float) else parsed


def _parse(memory: str | float) -> int | float:
    if isinstance(memory, str):
        written = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", memory.strip())
        if written is not None and written[2] in UNITS:
            return int(float(written[1]) * UNITS[written[2]])
    elif isinstance(memory, float):
        if 0 <= memory <= 1:
            return memory
    elif isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
        return memory
    raise ValueError(
        f"memory must be a number of bytes (2_000_000), a string ('2GiB') or a fraction of the free memory (0.5), got "
        f"{memory!r}; units are {', '.join(UNITS)}"
    )


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device: of a GPU as its driver reports it, else that of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that an allocation failed, whatever device or library raised it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES)

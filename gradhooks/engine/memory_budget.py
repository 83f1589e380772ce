"""Bytes: what the option `memory` allows, what a device has left, and how running out of memory is recognized."""

import os

import torch

from gradhooks.units import parse_bytes

_OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "not enough memory", "out of memory", "ALLOC_FAILED")


def memory_in_bytes(memory: str | float, device: torch.device) -> int:
    """Return the bytes of the option `memory`; a fraction is relative to the free memory of `device` now."""
    parsed = parse_bytes(memory)
    return int(parsed * free_bytes(device)) if isinstance(parsed, float) else parsed


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, as its driver reports it; that of the machine for a CPU."""
    report = None if device.type == "cpu" else getattr(torch.get_device_module(device), "mem_get_info", None)
    if report is not None:
        free, _ = report(device)
        return int(free)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that an allocation failed, whatever device or library raised it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES)

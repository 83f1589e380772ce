"""The device on which the tests run.

GRADHOOKS_TEST_DEVICE chooses it: `cpu` (the default), `cuda`, `cuda:1`, `python_device` (a folder here).
"""

import os

import pytest
import python_device
import torch


def _chosen() -> torch.device:
    name = os.environ.get("GRADHOOKS_TEST_DEVICE", "cpu")
    if name == python_device.NAME:
        python_device.register()
    device = torch.device(name)
    if device.index is None and device.type != "cpu":  # the device of a tensor has an index
        return torch.device(device.type, 0)
    return device


DEVICE = _chosen()

CORE = frozenset(
    [
        "accumulators_with_groups",
        "audit",
        "auto",
        "chunks",
        "combinations",
        "combinations_of_groups",
        "device_folding",
        "device_memory",
        "embeddings",
        "exactness",
        "faults",
        "groups",
        "leaks",
        "memory_budget",
        "model_state",
        "nonfinite_predictions",
        "out_of_memory",
        "packing",
        "plain_poses",
        "precision",
        "random_generators",
        "running_sums",
        "several_groups",
        "side_outputs",
        "skipping",
        "sparse_and_dropped_poses",
        "state_after_errors",
        "state_preserved",
        "stream_declarations",
        "unregistered_leaves",
        "waits",
        "wrong_declarations",
    ]
)
"""The files, without `test_`, that run on every device: exactness, state, skipping, groups, memory, faults, leaks."""

_MISSING = {
    "complex numbers": ([python_device.NAME], "PyTorch crashes when it passes them to a kernel in Python"),
    "comparisons of the state in every batch": (["cuda", "mps", python_device.NAME], "each would wait for the device"),
    "errors in hooks of a backward": ([python_device.NAME], "devices written in Python end the process there"),
    "sparse tensors": ([python_device.NAME], "PyTorch has no sparse tensors for it"),
    "skipping in a stream": (["cuda", "mps", python_device.NAME], "nobody waits for the weights of a stream"),
}
"""By feature: the devices without it, and why."""


def needs(feature: str) -> None:
    """Skip the running test if the device of the tests lacks a feature, one of `_MISSING`."""
    devices, reason = _MISSING[feature]
    if DEVICE.type in devices:
        pytest.skip(f"no {feature} on {DEVICE.type}: {reason}")

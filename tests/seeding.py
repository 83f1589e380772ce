"""Seed PyTorch's generators."""

import python_device
import torch

HAS_CUDA = torch.cuda.is_available()


def manual_seed(seed: int) -> None:
    """Seed the generators of the CPU, of the device written in Python, and of all GPUs.

    `torch.manual_seed` also formats a stack trace for each kind of device that is not initialized, which takes a
    millisecond: a fifth of the time of the suite.
    """
    torch.default_generator.manual_seed(seed)
    python_device.manual_seed(seed)
    if HAS_CUDA:
        torch.cuda.manual_seed_all(seed)

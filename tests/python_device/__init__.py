"""A device written in Python, on which PyTorch runs as on a GPU, on any machine.

Its tensors are ordinary tensors whose memory, on the host, belongs to the device: an operator runs on the CPU and gives
the numbers of the CPU. What a GPU has besides, it has too:

- It counts the operations for which the host waits, by operator and by line of gradhooks: `count_waits()`.
- It has its own memory, with live bytes, a peak and a limit: `MEMORY`. Beyond it, `torch.OutOfMemoryError` is raised.
- It has a random generator of its own, and autocast for products of matrices.
- An operator with tensors of both the device and the host is an error.

Not there: sparse tensors, streams, events, pinned memory, a `torch.Generator` of the device. `register()` is for the
whole process, and other backwards then use a thread of the device: tests run it in a process of its own, as
`GRADHOOKS_TEST_DEVICE=python_device python -m pytest ...` does.
"""

from python_device.backend import NAME, WHY_MISSING, manual_seed, register
from python_device.memory import MEMORY
from python_device.waits import WaitCount, count_waits

__all__ = ["MEMORY", "NAME", "WHY_MISSING", "WaitCount", "count_waits", "manual_seed", "register"]

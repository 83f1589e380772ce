"""Register the device with PyTorch."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from python_device import operators, recurrent, waits
from python_device.memory import MEMORY

NAME = "python_device"

WHY_MISSING = (
    ""
    if hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
    else "this release of torch has no devices written in Python"
)
"""Why the device cannot be registered; empty if it can."""

_LOWER_PRECISION = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "conv1d", "conv2d", "conv3d")
"""The operators whose arguments autocast casts."""


class Backend:
    """The module `torch.python_device`, with the names that PyTorch and gradhooks look for in `torch.cuda`."""

    _initialized = True
    device = nullcontext  # checkpoints enter it; there is one device only

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize(_device: Any = None) -> None:
        pass

    set_sync_debug_mode = staticmethod(waits.set_sync_debug_mode)
    get_sync_debug_mode = staticmethod(waits.get_sync_debug_mode)

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        manual_seed(seed)

    @staticmethod
    def get_rng_state(_device: Any = None) -> Tensor:
        return operators.RANDOM.state.clone()

    @staticmethod
    def set_rng_state(state: Tensor, _device: Any = None) -> None:
        operators.RANDOM.state = state.clone()

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def mem_get_info(_device: Any = None) -> tuple[int, int]:
        """Return the free bytes and all bytes; without a limit the device has 1 GiB."""
        total = 1 << 30 if MEMORY.limit is None else MEMORY.limit
        return max(0, total - MEMORY.live), total

    @staticmethod
    def memory_allocated(_device: Any = None) -> int:
        return MEMORY.live

    @staticmethod
    def max_memory_allocated(_device: Any = None) -> int:
        return MEMORY.peak

    @staticmethod
    def reset_peak_memory_stats(_device: Any = None) -> None:
        MEMORY.reset_peak()


def manual_seed(seed: int) -> None:
    """Seed the random generator of the device."""
    operators.RANDOM.state = torch.Generator().manual_seed(seed).get_state()


_libraries: list[torch.library.Library] = []  # a library unregisters its kernels when it is collected


def register() -> torch.device:
    """Register the device, for the whole process, and return it. A second call returns it again.

    Raises:
        RuntimeError: This release of torch cannot register a device that is written in Python.
    """
    if _libraries:
        return MEMORY.device
    if WHY_MISSING:
        raise RuntimeError(WHY_MISSING)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    MEMORY.device = torch.device(NAME, 0)
    every = torch.library.Library("_", "IMPL")
    every.fallback(operators.run, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("convolution_overrideable", operators.convolution, "PrivateUse1")
    aten.impl("convolution_backward_overrideable", operators.convolution_backward, "PrivateUse1")
    for name, kernel in recurrent.KERNELS.items():
        aten.impl(name, kernel, "PrivateUse1")
    for name in _LOWER_PRECISION:
        aten.impl(name, _in_lower_precision(name), "AutocastPrivateUse1")
    _libraries.extend([every, aten])
    _copy_and_move_storages()
    return MEMORY.device


def _copy_and_move_storages() -> None:
    clone, move, to_host = torch.UntypedStorage.clone, torch.UntypedStorage.to, torch.UntypedStorage.cpu

    def copied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        return MEMORY.copy_storage(storage) if storage.device.type == NAME else clone(storage)

    def moved(storage: torch.UntypedStorage, *, device: Any, non_blocking: bool = False) -> torch.UntypedStorage:
        if torch.device(device).type == NAME != storage.device.type:
            return MEMORY.adopt_storage(storage.clone())
        return move(storage, device=device, non_blocking=non_blocking)

    torch.UntypedStorage.clone = copied  # type: ignore[method-assign]

    def host_copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        return MEMORY.host_storage(storage).clone() if storage.device.type == NAME else to_host(storage)

    torch.UntypedStorage.to = moved  # type: ignore[method-assign]
    torch.UntypedStorage.cpu = host_copy  # type: ignore[method-assign]


def _in_lower_precision(name: str) -> Any:
    operator = getattr(torch.ops.aten, name).default
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(argument: Any) -> Any:
        castable = isinstance(argument, Tensor) and argument.dtype in {torch.float32, torch.bfloat16, torch.float16}
        return argument.to(torch.get_autocast_dtype(NAME)) if castable else argument

    def run(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*map(cast, arguments), **options)

    return run

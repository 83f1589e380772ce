"""The memory of the device: storages that it owns, and the tensors in them."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_set: Any = torch.ops.aten.set_.source_Storage_storage_offset
_as_strided: Any = torch.ops.aten.as_strided.default


class Memory:
    """The allocator of the device.

    Attributes:
        live: The bytes of all storages that are alive.
        peak: The largest value of `live` since `reset_peak`.
        limit: Beyond how many bytes an allocation fails; None for never.
        device: The device.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.limit: int | None = None
        self.device = torch.device("cpu")  # until the device is registered
        self._host: dict[int, torch.UntypedStorage] = {}  # by the address of the storage of the device

    def reset_peak(self) -> None:
        self.peak = self.live

    def adopt(self, result: Tensor) -> Tensor:
        """Return a tensor of the device in the memory of `result`, a new tensor of the host.

        Raises:
            torch.OutOfMemoryError: The limit is exceeded.
        """
        storage = self.adopt_storage(result.untyped_storage())
        tensor = torch._C._acc.create_empty_tensor([0], result.dtype)
        return self.place(tensor, storage, result.storage_offset(), result.size(), result.stride())

    def adopt_storage(self, host: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return a storage of the device that has the memory of one of the host."""
        size = host.nbytes()
        if self.limit is not None and self.live + size > self.limit:
            raise torch.OutOfMemoryError(
                f"the Python device is out of memory: {size} bytes beside {self.live} exceed {self.limit}"
            )
        storage = torch._C._construct_storage_from_data_pointer(host.data_ptr(), self.device, size)
        self._host[storage._cdata] = host
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage._cdata).atexit = False
        return storage

    def copy_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return a copy of a storage of the device."""
        return self.adopt_storage(self.host_storage(storage).clone())

    def host_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return the storage of the host that has the memory of one of the device."""
        host = self._host.get(storage._cdata)
        if host is None:  # PyTorch made it of an address, to write it to a file
            address, size = storage.data_ptr(), storage.nbytes()
            host = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), size)
        return host

    def _release(self, address: int) -> None:
        self.live -= self._host.pop(address).nbytes()

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the host that is in the memory of a tensor of the device."""
        host = self.host_storage(tensor.untyped_storage())
        view = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return view.set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload]

    @staticmethod
    def place(
        tensor: Tensor, storage: torch.UntypedStorage, offset: int, size: Sequence[int], stride: Sequence[int] = ()
    ) -> Tensor:
        """Give a tensor of the device a storage of the device."""
        _set.redispatch(_CPU_KERNELS, tensor, storage, offset, size, stride)
        return tensor

    @staticmethod
    def view(base: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
        """Return a view of a tensor of the device."""
        viewed: Tensor = _as_strided.redispatch(_CPU_KERNELS, base, size, stride, offset)
        return viewed


MEMORY = Memory()

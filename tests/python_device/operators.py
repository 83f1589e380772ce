"""Run an operator of the device on the CPU, in the memory of the device."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from python_device import waits
from python_device.memory import MEMORY

aten: Any = torch.ops.aten
_MAY_READ_HOST_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_WITHOUT_CPU_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


class RandomState:
    """The random generator of the device.

    Attributes:
        state: As of `torch.Generator.get_state`.
    """

    def __init__(self) -> None:
        self.state = torch.Generator().get_state()

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Draw from this generator, in the block, what is drawn from that of the CPU."""
        of_cpu = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(of_cpu)


RANDOM = RandomState()


def run(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Run any operator that has a tensor of the device among its arguments, or makes one."""
    if operator is aten._copy_from.default:
        return _copy(*arguments, **options)
    if operator is aten._fused_sdp_choice.default:
        return 0  # attention by its formula, whose operators any device has
    if operator is aten.set_.source_Storage_storage_offset:
        return MEMORY.place(*arguments)
    waits.note_operator(operator, arguments)
    arguments = _numbers_as_tensors(operator, arguments)
    inputs: list[tuple[Tensor, Tensor]] = []
    of_host: list[Tensor] = []

    def on_host(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            of_host.append(tensor)
            return tensor
        inputs.append((tensor, MEMORY.on_host(tensor)))
        return inputs[-1][1]

    host_arguments = _map(on_host, arguments)
    host_options = {name: _map(on_host, option) for name, option in options.items()} | _host_options(options)
    if inputs and of_host:
        _refuse_mixed_devices(operator, arguments, of_host)
    source = RANDOM.drawn_from() if _draws(operator) else nullcontext()
    with torch._C._ExcludeDispatchKeyGuard(_WITHOUT_CPU_AUTOCAST), source:
        results = operator(*host_arguments, **host_options)
    return _map(lambda result: _on_device(result, inputs), results)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors in an argument or a result; a pytree takes ten times longer."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, part) for part in value])
    return value


def _numbers_as_tensors(operator: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Restore what PyTorch converted to numbers on the way here: tensors of the host that were made of numbers."""
    places = [place for place in _tensors_only(operator) if isinstance(arguments[place], (int, float))]
    if not places:
        return arguments
    restored = list(arguments)
    for place in places:
        is_whole = isinstance(arguments[place], int)
        restored[place] = torch.tensor(arguments[place], dtype=torch.int64 if is_whole else torch.float64)
    return tuple(restored)


@functools.cache
def _tensors_only(operator: Any) -> list[int]:
    """Return the places of positional arguments that must be tensors; `mul` and its like also take numbers."""
    if torch._C._should_allow_numbers_as_tensors(operator.overloadpacket.__name__):
        return []
    positional = [argument for argument in operator._schema.arguments if not argument.kwarg_only]
    is_tensor = [isinstance(argument.type, torch.TensorType) for argument in positional]
    return [place for place, one in enumerate(is_tensor) if one and not positional[place].has_default_value()]


@functools.cache
def _draws(operator: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operator.tags


def convolution(*arguments: Any) -> Any:
    """Run a convolution, for which PyTorch has a kernel for all devices that only raises an error."""
    return run(aten.convolution.default, *arguments)


def convolution_backward(gradient: Tensor, images: Tensor, weight: Tensor, *options: Any) -> Any:
    """Run the backward of a convolution."""
    *settings, transposed, padding, groups, mask = options
    channels = weight.size(1) * groups if transposed else weight.size(0)
    arguments = [*settings, transposed, padding, groups, mask]
    return run(aten.convolution_backward.default, gradient, images, weight, [channels], *arguments)


def _on_device(result: Tensor, inputs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the tensor of the device for a result: an input, a view of an input, or a new one."""
    for tensor, host in inputs:
        if host is result:
            if host.shape != tensor.shape or host.stride() != tensor.stride():
                storage = _storage_of(host, inputs)
                MEMORY.place(tensor, storage, host.storage_offset(), host.size(), host.stride())
            return tensor
    for tensor, host in inputs:
        if host.untyped_storage()._cdata == result.untyped_storage()._cdata and result.dtype == tensor.dtype:
            return MEMORY.view(tensor, result.size(), result.stride(), result.storage_offset())
    return MEMORY.adopt(result)


def _storage_of(host: Tensor, inputs: list[tuple[Tensor, Tensor]]) -> torch.UntypedStorage:
    """Return the storage of the device that has the memory of `host`, which `resize_` or `out=` may have replaced."""
    address = host.untyped_storage().data_ptr()
    for tensor, _ in inputs:
        if tensor.untyped_storage().data_ptr() == address:
            return tensor.untyped_storage()
    return MEMORY.adopt(host).untyped_storage()


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    waits.note_copy(source, target, non_blocking=non_blocking)
    ends = [tensor if tensor.device.type == "cpu" else MEMORY.on_host(tensor) for tensor in (target, source)]
    ends[0].copy_(ends[1])
    return target


def _host_options(options: dict[str, Any]) -> dict[str, Any]:
    device = {"device": torch.device("cpu")} if options.get("device") is not None else {}
    return {**device, **({"pin_memory": False} if options.get("pin_memory") else {})}


def _refuse_mixed_devices(operator: Any, arguments: Any, of_host: list[Tensor]) -> None:
    if operator.overloadpacket.__name__ in _MAY_READ_HOST_INDICES:
        of_host = [tensor for tensor in of_host if not any(tensor is index for index in arguments[1])]
    refused = [tuple(tensor.shape) for tensor in of_host if tensor.dim() > 0]
    if refused:
        raise RuntimeError(
            f"{operator}: expected all tensors to be on the same device, found one of shape {refused[0]} on the CPU "
            "beside those on the Python device"
        )

"""RunningStatistics: buffers of normalization layers that a forward in training writes and does not read."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from gradhooks.engine.module_attributes import is_write_only
from gradhooks.engine.tensor_records import equal_values


class StatisticsCopy(NamedTuple):
    """A running statistic and a copy of its values."""

    tensor: Tensor
    value: Tensor


class RunningStatistics:
    """Copies and compares the running statistics of the modules that are in training now.

    Args:
        modules: The modules of a model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [module for module in modules if isinstance(module, _NormBase)]

    def read(self) -> tuple[StatisticsCopy, ...]:
        """Return copies of the statistics."""
        if not self._modules:
            return ()
        modules = filter(is_write_only, self._modules)
        buffers = [
            buffer
            for module in modules
            for buffer in module._buffers.values()
            if buffer is not None and not is_lazy(buffer)
        ]
        return tuple([StatisticsCopy(buffer, buffer.detach().clone()) for buffer in buffers])

    def equal(self, copies: tuple[StatisticsCopy, ...]) -> bool:
        """Return whether the statistics have the values of the copies."""
        now = self.read()
        return len(now) == len(copies) and all(
            one.tensor is other.tensor and equal_values(one.value, other.value)
            for one, other in zip(now, copies, strict=True)
        )


def write_statistics(copies: tuple[StatisticsCopy, ...]) -> None:
    """Give the statistics the values of the copies."""
    for statistics in copies:
        statistics.tensor.data.copy_(statistics.value)

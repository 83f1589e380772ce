"""ModuleValues: attributes, containers and buffers of all modules, with little work for those that never change."""

from collections.abc import Iterable, Sequence

from torch import nn

from gradhooks.engine.container_watch import ContainerWatch
from gradhooks.engine.module_attributes import ModuleRecord, Thoroughness
from gradhooks.engine.module_watch import ModuleWatch
from gradhooks.engine.tensor_watch import TensorWatch


class ModuleValues:
    """Records and restores what modules hold.

    A *quiet* module was never seen to change in a forward. All quiet modules are watched together, in a few calls of C;
    the others are recorded anew before each chunk.

    Args:
        modules: The modules.

    Attributes:
        records: What the modules held when they were recorded last.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._watches = [ModuleWatch(module) for module in modules]
        self.records: tuple[ModuleRecord, ...] = ()
        self._watch_quiet()

    @property
    def training_flags(self) -> tuple[bool, ...]:
        """The training flag of each module."""
        # Frozen TorchScript has none.
        return tuple([getattr(watch.module, "training", False) for watch in self._watches])

    def begin(self, thoroughness: Thoroughness) -> None:
        """Record all modules as they are; what changed before was not changed by a forward."""
        for watch in self._noisy:
            watch.forget()
        self._refresh(thoroughness, by_forward=False)

    @property
    def change_count(self) -> int:
        """The number of modules that are known to change."""
        return len(self._noisy)

    def snapshot(self, thoroughness: Thoroughness) -> tuple[ModuleRecord, ...]:
        """Return the records of now: those of before, if no module changed."""
        self._refresh(thoroughness, by_forward=True)
        return self.records

    def snapshot_changing(self, thoroughness: Thoroughness) -> tuple[ModuleRecord, ...]:
        """Return the records of now, under the assumption that no other modules change than those that are known to."""
        if self._noisy:
            self._refresh(thoroughness, by_forward=True, quiet=False)
        return self.records

    def restore(self, records: Sequence[ModuleRecord], thoroughness: Thoroughness) -> None:
        """Put back what all modules held."""
        # Only comparing everything shows what was written without a sign, also in modules that are known to change.
        self._refresh(thoroughness, by_forward=True, noisy=thoroughness == "everything")
        restored_quiet = False
        for watch, record in zip(self._watches, records, strict=True):
            if not watch.is_quiet or watch.record is not record:
                watch.restore(record)
                restored_quiet |= watch.is_quiet
        self._update_records()
        if restored_quiet:
            self._watch_quiet()

    def _refresh(self, thoroughness: Thoroughness, *, by_forward: bool, quiet: bool = True, noisy: bool = True) -> None:
        changed = False
        if quiet and not (self.records and self._quiet_unchanged(thoroughness)):
            for watch in [watch for watch in self._watches if watch.is_quiet]:
                changed |= watch.refresh(thoroughness, by_forward=by_forward)
            self._watch_quiet()
        for watch in self._noisy if noisy else ():
            changed |= watch.refresh(thoroughness, by_forward=by_forward)
        if changed or not self.records:
            self._update_records()

    def _update_records(self) -> None:
        self.records = tuple([watch.record for watch in self._watches])

    def _quiet_unchanged(self, thoroughness: Thoroughness) -> bool:
        if not (self._containers.unchanged() and self._tensors.unchanged()):
            return False
        compared = [] if thoroughness == "signs" else self._partly_shown
        if thoroughness == "cpu":
            compared = [record for record in compared if record.tensor.device.type == "cpu"]
        return all(record.has_same_values() for record in compared)

    def _watch_quiet(self) -> None:
        quiet = [watch.record for watch in self._watches if watch.is_quiet]
        tensors = [tensor for record in quiet for tensor in record.tensors]
        self._noisy = [watch for watch in self._watches if not watch.is_quiet]
        self._containers = ContainerWatch(container for record in quiet for container in record.containers)
        self._tensors = TensorWatch(tensors)
        self._partly_shown = [tensor for tensor in tensors if not tensor.shows_all]

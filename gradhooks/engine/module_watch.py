"""ModuleWatch: one module, recorded again and again; and which modules there are."""

from torch import nn

from gradhooks.engine.attribute_recorder import Recorder
from gradhooks.engine.module_attributes import EMPTY, MACHINERY, ModuleRecord, Thoroughness


class ModuleWatch:
    """Records what a module holds, again and again.

    Args:
        module: The module.

    Attributes:
        record: What the module held when it was recorded last, or restored.
        changes: Whether a forward was seen to change it, or changes do not show.
        hidden: Whether a tensor was seen to change without a sign (see `TensorWatch`): compared by content.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.record = EMPTY
        self.changes = False
        self.hidden = False

    @property
    def is_quiet(self) -> bool:
        """Whether changes show, and none was seen."""
        return not (self.changes or self.hidden)

    def forget(self) -> None:
        """Share nothing with earlier records: somebody else may have written, without a sign of it."""
        self.record = EMPTY

    def refresh(self, thoroughness: Thoroughness, *, by_forward: bool) -> bool:
        """Record the module; return whether it changed.

        Args:
            thoroughness: How to compare tensors.
            by_forward: Whether a change was made by a forward.
        """
        recorder = Recorder(self.record, thoroughness, hidden=self.hidden)
        record = recorder.record(self.module)
        self.hidden |= recorder.found_hidden
        if record is self.record:
            return False
        self.record = record
        self.changes |= by_forward or not record.shows_changes
        return True

    def restore(self, record: ModuleRecord) -> None:
        """Put back what the module held."""
        record.restore(self.record, hidden=self.hidden)
        self.record = record


def modules_in_use(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by path, with those that it hides in attributes and lists, such as `[teacher]`."""
    found = dict(model.named_modules())
    seen = {id(module) for module in found.values()}
    for path, module in list(found.items()):
        for name, value in vars(module).items():
            if name in MACHINERY:
                continue
            parts = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            for hidden in [part for part in parts if isinstance(part, nn.Module) and id(part) not in seen]:
                below = dict(hidden.named_modules(prefix=f"{path}.{name}".lstrip(".")))
                if model not in below.values():  # not the owner of the model
                    found.update((key, part) for key, part in below.items() if id(part) not in seen)
                    seen.update(map(id, below.values()))
    return found

"""Subject: what the ranks of a process group compare in one call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradhooks.distributed.combination_description import describe_function
from gradhooks.distributed.status import digest


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        model: The bare model.
        combination: The combination.
        settings: Options and modes of the call, by name.
    """

    model: nn.Module
    combination: Any
    settings: Mapping[str, object]

    def parameters(self) -> list[tuple[str, Tensor]]:
        """Return the parameters of the model and of the combination with their names."""
        named: list[tuple[str, Tensor]] = list(self.model.named_parameters())
        if isinstance(self.combination, nn.Module):
            named += self.combination.named_parameters("combination")
        return named

    def describe_settings(self) -> dict[str, str]:
        """Return what may differ from call to call."""
        modes = {f"the mode of module {path!r}": _mode(each) for path, each in self.model.named_modules()}
        settings = {name: str(value) for name, value in self.settings.items()}
        return {**settings, "the combination": describe_function(self.combination), **modes}

    def settings_digest(self) -> float:
        """Return a digest of `describe_settings`, without the paths of modules, which take time to find."""
        flags = bytes(module.training for module in self.model.modules())
        return digest(repr([*self.settings.values(), describe_function(self.combination), flags]).encode())


def _mode(module: nn.Module) -> str:
    return "training" if module.training else "evaluation"

"""Subject: what the ranks of a process group compare in one call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradhooks.distributed.combination_description import describe_function


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        model: The bare model.
        combination: The combination.
        settings: Options and modes of the call, by name.
        training_flags: The training flag of each module.
        version: The same object as in the last call if no module and no parameter of the model was replaced.
    """

    model: nn.Module
    combination: Any
    settings: Mapping[str, object]
    training_flags: tuple[bool, ...]
    version: object

    @property
    def key(self) -> tuple[object, ...]:
        """What may differ from call to call, for the same objects in the same process."""
        of_combination: list[object] = []
        if isinstance(self.combination, nn.Module):
            of_combination = [(id(each), each.requires_grad, _memory(each)) for each in self.combination.parameters()]
        return id(self.version), *of_combination

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

    def settings_key(self) -> tuple[object, ...]:
        """Return what `describe_settings` describes, without the paths of modules, which take time to find."""
        return *self.settings.values(), describe_function(self.combination), self.training_flags


def _memory(parameter: Tensor) -> int:
    return parameter.data_ptr() if type(parameter) is nn.Parameter else 0  # others may have none


def _mode(module: nn.Module) -> str:
    return "training" if module.training else "evaluation"

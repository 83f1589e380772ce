"""StepRecord: what one training step leaves."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradhooks.profiling.independent_copy import IndependentCopy
from gradhooks.profiling.model_contents import TensorContent, plain_value, read_contents
from gradhooks.random_state import generator_source

OF_COMBINATION = " of the combination"


class StepRecord(NamedTuple):
    """What one step leaves.

    Attributes:
        gradients: Of all leaves, by name.
        contents: Of the model and the combination, by name, after the step of the optimizer.
    """

    gradients: dict[str, Tensor | None]
    contents: dict[str, Any]


def read_gradients(leaves: Mapping[str, Tensor], scale: float) -> dict[str, Tensor | None]:
    """Return copies of the gradients, divided by the scale of the loss."""
    return {name: None if leaf.grad is None else leaf.grad.detach().clone() / scale for name, leaf in leaves.items()}


def read_copy(copied: IndependentCopy) -> dict[str, Any]:
    """Return what a copy of a model holds, with its combination and the generators of the user."""
    contents = read_contents(copied.model)
    if isinstance(copied.combination, nn.Module):
        combination = read_contents(copied.combination)
        contents.update((f"{name}{OF_COMBINATION}", value) for name, value in combination.items())
    for number, generator in enumerate(copied.options.get("generators", ())):
        source = generator_source(generator)
        if source is not None:
            contents[f"the generator generators[{number}]"] = plain_value(source.get())
    return contents


def set_parameters(copied: IndependentCopy, contents: Mapping[str, Any]) -> None:
    """Give the parameters the values that another trial left."""
    for module, suffix in ((copied.model, ""), (copied.combination, OF_COMBINATION)):
        for name, leaf in module.named_parameters() if isinstance(module, nn.Module) else ():
            content = contents.get(f"parameter {name}{suffix}")
            if isinstance(content, TensorContent):
                leaf.data.copy_(content.value)

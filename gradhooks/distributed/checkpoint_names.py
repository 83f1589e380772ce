"""Names of parameters in checkpoints of `torch.distributed.checkpoint`."""

import functools
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import nn

WRAPPED = "model."
"""What the keys of a wrapper's state dict leave out."""


def adapt_distributed_checkpoints(is_wrapper: Callable[[nn.Module], bool]) -> None:
    """Make `torch.distributed.checkpoint` name the parameters of optimizers as those of models.

    It names the latter by walking the modules, which asks for `key_modifiers`, and the former by `named_parameters()`,
    which asks nobody: the names of one parameter would differ, and no checkpoint with an optimizer could be loaded. The
    one function through which all names go is private; where it is missing nothing is changed.

    Args:
        is_wrapper: Whether the state dict of a module has the keys of its child `model`.
    """
    checkpoint: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    original = getattr(checkpoint, "_get_fqns", None)
    if original is None or hasattr(original, "_of_gradhooks"):
        return

    @functools.wraps(original)
    def get_names(model: nn.Module, name: str, *arguments: Any, **options: Any) -> Any:
        return original(model, _bare_name(model, name, is_wrapper), *arguments, **options)

    get_names._of_gradhooks = True  # type: ignore[attr-defined]
    checkpoint._get_fqns = get_names


def _bare_name(root: nn.Module, name: str, is_wrapper: Callable[[nn.Module], bool]) -> str:
    """Return the name of a parameter of `root` without the names of wrapped models."""
    kept: list[str] = []
    rest = name
    module: Any = root
    while rest:
        first, _, following = rest.partition(".")
        if isinstance(module, nn.Module) and is_wrapper(module) and rest.startswith(WRAPPED) and _exists(module, rest):
            module, rest = module.get_submodule(first), following
            continue
        kept.append(first)
        module, rest = getattr(module, first, root), following
    return ".".join(kept)


def _exists(module: nn.Module, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True

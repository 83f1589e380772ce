"""Give `state_dict` the keys of the bare model, so that checkpoints of both can be exchanged."""

import functools
import sys
from collections.abc import Callable, MutableMapping
from operator import attrgetter
from typing import Any

from torch import nn

WRAPPED = "model."
# While a module loads: its prefix in the checkpoint, which only the pre-hook gets.
_PREFIX = "_loading_prefix"


def use_keys_of_bare_model(wrapper: nn.Module) -> None:
    """Save and load `wrapper.model.weight` as `weight`; the other children of `wrapper` keep their prefix."""
    wrapper._register_state_dict_hook(_remove_prefix)
    wrapper.register_load_state_dict_pre_hook(_add_prefix)
    wrapper.register_load_state_dict_post_hook(_rename_incompatible)


def key_modifiers(wrapper: nn.Module, model: nn.Module) -> dict[str, str]:
    """Return, by the first part of a key, the child of `wrapper` that the key leaves out.

    `torch.distributed.checkpoint.state_dict`, and Accelerate with it, walks the modules to make keys of its own. It
    cannot tell a child of `model` named "model" from the wrapped model.
    """
    _adapt_distributed_checkpoints()
    left_out = WRAPPED.removesuffix(".")
    names = {*model._modules.keys(), *model._parameters.keys(), *model._buffers.keys()}
    return dict.fromkeys(names - _other_children(wrapper) - {left_out}, left_out)


def _adapt_distributed_checkpoints() -> None:
    """Make `torch.distributed.checkpoint` name the parameters of optimizers as those of models.

    It names the latter by walking the modules, which asks for `key_modifiers`, and the former by `named_parameters()`,
    which asks nobody: the names of one parameter would differ, and no checkpoint with an optimizer could be loaded. The
    one function through which all names go is private; where it is missing nothing is changed.
    """
    checkpoint: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    original = getattr(checkpoint, "_get_fqns", None)
    if original is None or hasattr(original, "_of_gradhooks"):
        return

    @functools.wraps(original)
    def get_names(model: nn.Module, name: str, *arguments: Any, **options: Any) -> Any:
        return original(model, _bare_name(model, name), *arguments, **options)

    get_names._of_gradhooks = True  # type: ignore[attr-defined]
    checkpoint._get_fqns = get_names


def _bare_name(root: nn.Module, name: str) -> str:
    """Return the name of a parameter of `root` without the names of wrapped models."""
    kept: list[str] = []
    rest, module = name, root
    while rest:
        first, _, following = rest.partition(".")
        if _is_wrapper(module) and rest.startswith(WRAPPED) and _exists(module, rest):
            module, rest = module.get_submodule(first), following
            continue
        kept.append(first)
        module, rest = getattr(module, first, root), following
    return ".".join(kept)


def _is_wrapper(module: object) -> bool:
    return isinstance(module, nn.Module) and _remove_prefix in module._state_dict_hooks.values()


def _exists(module: nn.Module, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def _other_children(wrapper: nn.Module) -> set[str]:
    """Return the children of `wrapper`, except the model, that have entries in its state_dict."""
    return {name for name, child in wrapper.named_children() if f"{name}." != WRAPPED and any(child.state_dict())}


def _remove_prefix(module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    del module, local_metadata
    _rename(state, prefix, lambda key: key.removeprefix(WRAPPED))
    if hasattr(state, "_metadata"):  # versions of the modules, by path without the final dot
        _rename(state._metadata, prefix, lambda path: f"{path}.".removeprefix(WRAPPED).removesuffix("."))


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    module.__dict__[_PREFIX] = prefix
    others = _other_children(module)
    _rename(state, prefix, lambda key: key if key.split(".")[0] in others else WRAPPED + key)


def _rename_incompatible(module: nn.Module, incompatible: Any) -> None:
    """Rename missing and unexpected keys to what they are in the checkpoint."""
    prefix = module.__dict__.pop(_PREFIX)
    for keys in incompatible:
        keys[:] = [_without_wrapped(prefix, key) for key in keys]


def _without_wrapped(prefix: str, key: str) -> str:
    wrapped = prefix + WRAPPED
    return prefix + key.removeprefix(wrapped) if key.startswith(wrapped) else key


def _rename(entries: MutableMapping[str, Any], prefix: str, new_name: Callable[[str], str]) -> None:
    for key in [key for key in entries if key.startswith(prefix)]:
        entries[prefix + new_name(key.removeprefix(prefix))] = entries.pop(key)

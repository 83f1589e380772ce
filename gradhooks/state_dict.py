"""`state_dict` with the bare model's own keys, so that checkpoints go both ways."""

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import nn

WRAPPED = "model."
# While a module is loaded: its place in the checkpoint, which only the hook that runs before is told.
_LOADING = "_loading_from_prefix"


def use_keys_of_the_bare_model(wrapper: nn.Module) -> None:
    """Let `wrapper.model.weight` be saved and loaded as `weight`; the other children of `wrapper` keep their prefix."""
    wrapper._register_state_dict_hook(_strip)
    wrapper.register_load_state_dict_pre_hook(_restore)
    wrapper.register_load_state_dict_post_hook(_report)


def hidden_parents(wrapper: nn.Module, model: nn.Module) -> dict[str, str]:
    """By the first part of a key, the child of `wrapper` that the key leaves out.

    `torch.distributed.checkpoint.state_dict`, and Accelerate with it, walks the modules to make keys of its own. A
    child called as the hidden one cannot be told from it there.
    """
    hidden = WRAPPED.removesuffix(".")
    names = {*model._modules.keys(), *model._parameters.keys(), *model._buffers.keys()}
    return dict.fromkeys(names - _own(wrapper) - {hidden}, hidden)


def _own(wrapper: nn.Module) -> set[str]:
    """The other children of `wrapper` that have something to save."""
    return {name for name, child in wrapper.named_children() if f"{name}." != WRAPPED and any(child.state_dict())}


def _strip(module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    del module, local_metadata
    _rename(state, prefix, lambda key: key.removeprefix(WRAPPED))
    if hasattr(state, "_metadata"):  # versions of the modules, by path without the dot at the end
        _rename(state._metadata, prefix, lambda path: f"{path}.".removeprefix(WRAPPED).removesuffix("."))


def _restore(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    module.__dict__[_LOADING] = prefix
    own = _own(module)
    _rename(state, prefix, lambda key: key if key.split(".")[0] in own else WRAPPED + key)


def _report(module: nn.Module, incompatible: Any) -> None:
    """Call what is missing or unexpected by the name it has, or should have, in the checkpoint."""
    prefix = module.__dict__.pop(_LOADING)
    for keys in incompatible:
        keys[:] = [_without(prefix, key) for key in keys]


def _without(prefix: str, key: str) -> str:
    wrapped = prefix + WRAPPED
    return prefix + key.removeprefix(wrapped) if key.startswith(wrapped) else key


def _rename(entries: MutableMapping[str, Any], prefix: str, new_name: Callable[[str], str]) -> None:
    for key in [key for key in entries if key.startswith(prefix)]:
        entries[prefix + new_name(key.removeprefix(prefix))] = entries.pop(key)

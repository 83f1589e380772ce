"""`state_dict` with the bare model's own keys, so that checkpoints go both ways."""

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import nn

WRAPPED = "model."


def use_keys_of_the_bare_model(wrapper: nn.Module) -> None:
    """Let `wrapper.model.weight` be saved and loaded as `weight`; the other children of `wrapper` keep their prefix."""
    wrapper._register_state_dict_hook(_strip)
    wrapper.register_load_state_dict_pre_hook(_restore)


def _strip(module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    del module, local_metadata
    _rename(state, prefix, lambda key: key.removeprefix(WRAPPED))
    if hasattr(state, "_metadata"):  # versions of the modules, by path without the dot at the end
        _rename(state._metadata, prefix, lambda path: f"{path}.".removeprefix(WRAPPED).removesuffix("."))


def _restore(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {name for name, child in module.named_children() if f"{name}." != WRAPPED and any(child.state_dict())}
    _rename(state, prefix, lambda key: key if key.split(".")[0] in own else WRAPPED + key)


def _rename(entries: MutableMapping[str, Any], prefix: str, new_name: Callable[[str], str]) -> None:
    for key in [key for key in entries if key.startswith(prefix)]:
        entries[prefix + new_name(key.removeprefix(prefix))] = entries.pop(key)

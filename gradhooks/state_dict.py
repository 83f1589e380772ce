"""Give `state_dict` the keys of the bare model, so that checkpoints of both can be exchanged."""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, cast

from torch import nn

from gradhooks.distributed.checkpoint_names import WRAPPED, adapt_distributed_checkpoints

# While a module loads: its prefix in the checkpoint, which only the pre-hook gets.
_PREFIX = "_loading_prefix"


class BareModelKeys(nn.Module):
    """A module whose child `model` is saved and loaded without a prefix; its other children keep theirs."""

    def _use_keys_of_bare_model(self) -> None:
        self._register_state_dict_hook(_remove_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.register_load_state_dict_post_hook(_rename_incompatible)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return an iterator over the children, as for every module."""
        # `torch.distributed.checkpoint` has been imported if it asks; torch 2.6 asks for nothing else.
        adapt_distributed_checkpoints(lambda module: _remove_prefix in module._state_dict_hooks.values())
        return super().named_children()

    def _fqn_modifiers(self) -> dict[str, str]:
        """Return, by the first part of a key, the child that the key leaves out.

        `torch.distributed.checkpoint.state_dict`, and Accelerate with it, walks the modules to make keys of its own. It
        cannot tell a child of `model` named "model" from the wrapped model.
        """
        left_out, model = WRAPPED.removesuffix("."), cast("nn.Module", self.model)
        names = {*model._modules.keys(), *model._parameters.keys(), *model._buffers.keys()}
        return dict.fromkeys(names - _other_children(self) - {left_out}, left_out)


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

"""Check the keyword arguments of a call, which go to the combination."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from gradhooks.errors import CombinationError
from gradhooks.group_loop import name_of

_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def refuse_unknown_arguments(combination: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that the combination does not take, before any pose runs.

    Args:
        combination: A `Combination`, a callable, or None.
        arguments: The keyword arguments of the call.

    Raises:
        CombinationError: There is one.
    """
    taken = _keywords_of(combination) if arguments else None
    unknown = [] if taken is None else [name for name in arguments if name not in taken]
    if taken is None or not unknown:
        return
    options = " and ".join(f"{name}=" for name in taken) if taken else "no keywords"
    raise CombinationError(
        f"the combination {name_of(combination)} takes {options}; got {', '.join(f'{name}=' for name in unknown)}. "
        "Keywords of the call go to the combination, except for groups=, the group number of each pose. Options of "
        "MultiPose are given when it is made, and inputs of the model are part of each pose"
    )


def _keywords_of(combination: Any) -> list[str] | None:
    """Return the keywords that a combination takes; None if it takes any, or if that cannot be known."""
    if combination is None:
        return []
    if isinstance(combination, nn.Module):
        if combination._forward_pre_hooks:  # which may change the arguments
            return None
        combination = combination.forward
    try:
        _, *others = inspect.signature(combination).parameters.values()
    except (TypeError, ValueError):  # no signature, as of many functions of C, or no parameters
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in others):
        return None
    return [parameter.name for parameter in others if parameter.kind in _BY_KEYWORD]

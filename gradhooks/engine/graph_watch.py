"""GraphWatch: sees whether a graph outlives the forward that built it, and who holds it.

The node at which a backward ends in a leaf lives as long as a graph refers to it, and a hook on the node lives as long
as the node. So the hook shows whether any graph that reaches the leaf is left, wherever it is kept: in an attribute, a
list, a closure, an object of another library.
"""

import gc
import weakref
from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor, nn

from gradhooks.engine.graph_leaves import reached_leaves
from gradhooks.engine.tensor_names import places_of_tensors
from gradhooks.errors import OutlivingGraphError


class _Sentinel:
    """A hook that lives as long as its node; once expired, a backward through the node is an error."""

    __slots__ = ("__weakref__", "expired")

    def __init__(self) -> None:
        self.expired = False

    def __call__(self, *gradients: object) -> None:
        del gradients
        if self.expired:
            raise OutlivingGraphError(
                "this loss depends on a tensor that the model kept from the audit of gradhooks, such as an entry of a "
                "cache outside the model; clear the cache, and let the model keep no tensors with graphs"
            )


class GraphWatch:
    """Watches the graphs that reach some leaves.

    Make it before the forward, while somebody else holds the nodes of the leaves, and ask when nobody does.

    Args:
        leaves: Leaves that no graph reaches yet.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._sentinels: list[weakref.ref[_Sentinel]] = []
        for leaf in leaves:
            node, sentinel = torch.autograd.graph.get_gradient_edge(leaf).node, _Sentinel()
            node.register_hook(sentinel)
            self._sentinels.append(weakref.ref(sentinel))

    def outlived(self) -> bool:
        """Return whether a graph is left. Called when all that the forward returned is gone."""
        torch.clear_autocast_cache()  # contains casts of the leaves, with their graphs
        if not self._alive():
            return False
        gc.collect()  # a graph in a reference cycle is left to the garbage collector
        return bool(self._alive())

    def expire(self) -> None:
        """Let every later backward through the graphs that are left raise an error."""
        for sentinel in self._alive():
            sentinel.expired = True

    def _alive(self) -> list[_Sentinel]:
        return [sentinel for reference in self._sentinels if (sentinel := reference()) is not None]


def tensors_with_graph() -> dict[int, Tensor]:
    """Return all tensors of this process that have a graph, by their ids. Takes about 0.1 s."""
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return {id(tensor): tensor for tensor in found if tensor.grad_fn is not None}


def describe_holders(model: nn.Module, leaves: Sequence[Tensor]) -> str:
    """Describe where tensors are kept whose graphs reach one of the leaves: `encoder.last_hidden, a list (...)`."""
    ids = {id(leaf) for leaf in leaves}
    kept = [
        tensor for tensor in tensors_with_graph().values() if any(id(leaf) in ids for leaf in reached_leaves(tensor)[0])
    ]
    return describe_places(model, kept)


def describe_places(model: nn.Module, tensors: Sequence[Tensor]) -> str:
    """Describe where some tensors are kept."""
    known = places_of_tensors(model)
    places = [known[id(tensor)][1] for tensor in tensors if id(tensor) in known]
    places = places or [_describe_referrer(tensor, tensors) for tensor in tensors]
    return ", ".join(dict.fromkeys(places)) or "an object that is not visible from Python"


def _describe_referrer(tensor: Tensor, ours: object) -> str:
    kinds = [
        type(referrer).__name__
        for referrer in gc.get_referrers(tensor)
        if referrer is not ours and not isinstance(referrer, FrameType)
    ]
    known = {"list": "a list", "dict": "a dictionary", "cell": "a closure", "tuple": "a tuple"}
    kind = next((known[kind] for kind in kinds if kind in known), "an object")
    return f"{kind} that is no attribute of the model (a tensor of shape {tuple(tensor.shape)})"

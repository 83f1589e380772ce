"""Finds, in the first pose of a group, leaves that no stand-in covers, and refuses them by name."""

from torch import Tensor, nn

from gradhooks.errors import PredictionError, UnregisteredTensorError
from gradhooks.group import Chunk, Group
from gradhooks.shadow import reached_leaves
from gradhooks.trees import tensors_in


def run_guarded(group: Group, chunk: Chunk) -> Tensor:
    """The live predictions of a chunk that every gradient can be intercepted for.

    A leaf that the model makes in its forward (positions that it differentiates by) is another tensor at each run, and
    nobody's business; one that comes back in a second run would have been trained by the full graph.

    Raises:
        UnregisteredTensorError: The predictions depend on a parameter, or a lasting tensor, that has no stand-in.
    """
    predictions = group.run(chunk.start, chunk.stop)
    _refuse_gradients(group)
    strangers = _strangers(group, predictions)
    _refuse([leaf for leaf in strangers if isinstance(leaf, nn.Parameter)], group)
    if strangers:
        del predictions
        group.replay.restore(chunk.before)
        predictions = group.run(chunk.start, chunk.stop)
        inputs = {id(tensor) for _, tensor in tensors_in(group.poses.between(chunk.start, chunk.stop))}
        known = {id(leaf) for leaf in strangers}
        lasting = [leaf for leaf in _strangers(group, predictions) if id(leaf) in known]
        _refuse([leaf for leaf in lasting if id(leaf) not in inputs], group)
        # What is left are inputs that the model itself marked; the poses' backwards must leave their `.grad` alone.
        group.only_leaves = bool(lasting)
    return predictions


def _refuse_gradients(group: Group) -> None:
    if any(leaf.grad is not None for leaf in group.shadows.leaves):
        raise PredictionError(
            "pose 0: the model calls backward() in its forward, which adds to the gradients of its parameters for each "
            "pose; let it use torch.autograd.grad(..., create_graph=True) for derivatives that the prediction needs"
        )


def _strangers(group: Group, predictions: Tensor) -> list[Tensor]:
    known = {id(leaf) for leaf in group.shadows.leaves}
    return [leaf for leaf in reached_leaves(predictions) if id(leaf) not in known]


def _refuse(leaves: list[Tensor], group: Group) -> None:
    if not leaves:
        return
    names = group.names()
    found = ", ".join(names.get(id(leaf), _described(leaf)) for leaf in leaves)
    raise UnregisteredTensorError(
        f"the prediction of pose 0 depends on {found}, which gradhooks cannot intercept: it is neither a registered "
        "parameter of the model nor a tensor found in the pose. Register it (nn.Parameter as a module attribute, or "
        "nn.ParameterList), pass it as part of the pose (tensor, mapping, tuple, dataclass), or detach it"
    )


def _described(leaf: Tensor) -> str:
    kind = "a parameter" if isinstance(leaf, nn.Parameter) else "a tensor that requires grad"
    return f"{kind} of shape {tuple(leaf.shape)}"

"""Finds, in the graph of each pose, leaves that no stand-in covers, and refuses them by name."""

from torch import Tensor, nn

from gradhooks.engine.context import Chunk, Group
from gradhooks.errors import PredictionError, UnregisteredTensorError


def run_guarded(group: Group, chunk: Chunk) -> Tensor:
    """The live predictions of a chunk that every gradient can be intercepted for.

    A leaf that the model makes in its forward (positions that it differentiates by) is another tensor at each run, and
    nobody's business; one that comes back in a second run would have been trained by the full graph.

    Raises:
        UnregisteredTensorError: The predictions depend on a parameter, or a lasting tensor, that has no stand-in.
        PredictionError: The model called `backward()`.
    """
    if group.sharding:  # every backward ends in the real leaves, whatever they are
        return group.run(chunk.start, chunk.stop)
    predictions = _run(group, chunk)
    # A look into reentrant checkpoints costs a forward: once a group.
    inside, group.looked_inside = not group.looked_inside, True
    strangers = group.strangers(predictions, inside_checkpoints=inside)
    _refuse([leaf for leaf in strangers if isinstance(leaf, nn.Parameter)], group, chunk)
    if strangers and not group.makes_leaves:
        del predictions
        group.makes_leaves = True
        with group.replay.undone():  # running statistics, which `chunk.before` may not know, have had this chunk
            group.replay.restore(chunk.before)
            predictions = _run(group, chunk)
        known = {id(leaf) for leaf in strangers}
        again = group.strangers(predictions, inside_checkpoints=inside)
        _refuse([leaf for leaf in again if id(leaf) in known], group, chunk)
    return predictions


def _run(group: Group, chunk: Chunk) -> Tensor:
    before = group.shadows.gathered(everywhere=chunk.start == 0)
    predictions = group.run(chunk.start, chunk.stop)
    if group.shadows.gathered(everywhere=chunk.start == 0) != before:
        raise PredictionError(
            f"pose {chunk.start}: the model calls backward() in its forward, which adds to the gradients of its "
            "parameters at every call; let it use torch.autograd.grad(..., create_graph=True) for derivatives that the "
            "prediction needs"
        )
    return predictions


def _refuse(leaves: list[Tensor], group: Group, chunk: Chunk) -> None:
    if not leaves:
        return
    names = group.names()
    found = ", ".join(names.get(id(leaf), _described(leaf)) for leaf in leaves)
    raise UnregisteredTensorError(
        f"the prediction of pose {chunk.start} depends on {found}, which gradhooks cannot intercept: it is neither a "
        "registered parameter of the model nor a tensor found in the pose. Register it (nn.Parameter as a module "
        "attribute, or nn.ParameterList), pass it as part of the pose (tensor, mapping, tuple, dataclass), or detach it"
    )


def _described(leaf: Tensor) -> str:
    kind = "a parameter" if isinstance(leaf, nn.Parameter) else "a tensor that requires grad"
    return f"{kind} of shape {tuple(leaf.shape)}"

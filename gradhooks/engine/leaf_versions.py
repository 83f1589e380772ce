"""Leaves that are changed in place between forward and backward, such as by an optimizer's step."""

from collections.abc import Sequence

from gradhooks.engine.context import ForwardContext
from gradhooks.engine.tensor_records import version_of


def leaf_versions(context: ForwardContext) -> list[int]:
    """Return the version counters of the real leaves."""
    return [version_of(leaf) for leaf in context.leaves.real]


def refuse_changed_leaves(context: ForwardContext, versions: Sequence[int]) -> None:
    """Refuse leaves that were changed in place since `versions`, as autograd does.

    Excepted are parameters that forwards themselves change (`nn.Embedding(max_norm=...)`): another forward may have run
    since then, and second runs restore what each pose found.

    Raises:
        RuntimeError: A leaf was changed.
    """
    leaves = context.leaves.real
    changed = [number for number, leaf in enumerate(leaves) if version_of(leaf) != versions[number]]
    if not changed:
        return
    by_forwards = set(map(id, context.batch.parts.state.changing_parameters))
    names = context.leaves.names(context.batch.model)
    for number in changed:
        leaf = leaves[number]
        if id(leaf) not in by_forwards:
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{names[number]}, of shape {tuple(leaf.shape)}, is at version {version_of(leaf)}; expected version "
                f"{versions[number]} instead. Call backward() before the optimizer's step"
            )

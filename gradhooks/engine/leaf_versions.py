"""Leaves that are changed in place between forward and backward, such as by an optimizer's step."""

from collections.abc import Sequence
from operator import attrgetter

from gradhooks.engine.context import ForwardContext
from gradhooks.engine.tensor_records import version_of

_counter_of = attrgetter("_version")


def leaf_versions(context: ForwardContext) -> list[int]:
    """Return the version counters of the real leaves."""
    leaves = context.leaves.real
    try:
        return list(map(_counter_of, leaves))
    except RuntimeError:  # an inference tensor has none
        return list(map(version_of, leaves))


def refuse_changed_leaves(context: ForwardContext, versions: Sequence[int]) -> None:
    """Refuse leaves that were changed in place since `versions`, as autograd does.

    Excepted are parameters that forwards themselves change (`nn.Embedding(max_norm=...)`): another forward may have run
    since then, and second runs restore what each pose found.

    Raises:
        RuntimeError: A leaf was changed.
    """
    now = leaf_versions(context)
    if now == versions:
        return
    leaves = context.leaves.real
    changed = [number for number, version in enumerate(now) if version != versions[number]]
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

"""Tells `.grad is None` from a vanishing gradient: leaves that no pose reaches, or skipped poses alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradhooks.engine.context import Chunk, Group
from gradhooks.engine.gradient_sums import Gradients
from gradhooks.engine.rerun import RerunJob, packed

# Groups in which a parameter is looked for in vain, before it counts as unused.
UNUSED_AFTER = 5


def zero_where_reached(group: Group, chunks: Sequence[Chunk], matters: Tensor, gradients: Gradients) -> None:
    """Give zeros to the leaves that only skipped poses reach.

    It costs a forward of each skipped pose to learn that none reaches a leaf. A parameter that was looked for in vain
    in several groups is not looked for again, until a pose that matters reaches it.
    """
    if all(gradient is not None for gradient in gradients):
        return
    in_vain, named = group.sizes.experience.in_vain, group.names()
    names = [named[id(real)] for real in group.shadows.real]
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            in_vain.pop(name, None)
    sought = [
        place for place, name in enumerate(names) if gradients[place] is None and in_vain.get(name, 0) < UNUSED_AFTER
    ]
    skips = (~matters).tolist()
    skipped = [RerunJob(group, chunk, slice(*chunk[:2]), 0) for chunk in chunks if any(skips[slice(*chunk[:2])])]
    if not (sought and skipped):
        return
    found = group.sizes.until_they_fit(lambda: _reached(group, skipped, skips, sought))
    for place in sought:
        if place in found:
            gradients[place] = torch.zeros_like(group.shadows.leaves[place])
            in_vain.pop(names[place], None)
        elif place < len(names) - len(group.shadows.inputs):
            in_vain[names[place]] = in_vain.get(names[place], 0) + 1


def _reached(group: Group, skipped: Sequence[RerunJob], skips: Sequence[bool], sought: Sequence[int]) -> set[int]:
    """Which of the leaves that are sought some skipped pose reaches."""
    places = {id(group.shadows.leaves[place]): place for place in sought}
    found: set[int] = set()
    size = group.sizes.next(len(group.poses), with_graph=True)
    with group.rerunning():
        for part, chunk, *_ in packed(skipped, skips, size) if group.steady else skipped:
            group.replay.restore(chunk.before)
            predictions = part.run(chunk.start, chunk.stop)
            reached = group.reached(predictions, inside_checkpoints=True)
            found |= {places[id(leaf)] for leaf in reached if id(leaf) in places}
            if len(found) == len(sought):
                break
    return found

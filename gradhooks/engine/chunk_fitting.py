"""Fit the number of poses in a chunk to the sizes of its poses, before the chunk runs."""

from gradhooks.engine.accumulation import Chunk
from gradhooks.engine.model_state import Snapshot
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.schedule import Schedule


def next_chunk(
    poses: Poses, schedule: Schedule, previous: Chunk | None, before: Snapshot, longest: int | None = None
) -> Chunk:
    """Return the next intercepted chunk.

    A padded chunk costs its number of poses times its longest pose, which shows in the bytes of its input. As many
    poses are collated as would fit if they were as long as those of the previous chunk; if they are longer, fewer.

    Args:
        poses: The poses.
        schedule: The sizes of the batch.
        previous: The chunk before, None for the first.
        before: The state of the model.
        longest: How many poses it has at most; None for any number.
    """
    start, pose_bytes = (0, 0) if previous is None else (previous.stop, previous.pose_bytes)
    size = schedule.chunk_size(len(poses) - start, pose_bytes, longest=longest)
    if not (poses.collated and schedule.depends_on_lengths):
        return Chunk(start, start + size, before)
    while True:
        pose_bytes = -(-poses.prepare(start, start + size) // size)
        fitting = schedule.chunk_size(size, pose_bytes)
        if fitting == size:
            return Chunk(start, start + size, before, pose_bytes)
        size = max(fitting, size // 2)  # the longest pose may be the last

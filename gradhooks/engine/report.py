from dataclasses import dataclass


@dataclass
class Report:
    """What became of a group's poses. The counts grow until the group's outer backward has run.

    Attributes:
        poses: Poses in the group.
        backwards: Backwards through the model, in the forward of the group and in its outer backward.
        skipped: Poses that got no backward, since they do not matter.
        recomputed: Poses that were run a second time.
        retained: Poses whose graph was kept for the outer backward.
        accumulator: Which accumulator did it, also where `auto` chose.
        reason: Why that one.
    """

    poses: int = 0
    backwards: int = 0
    skipped: int = 0
    recomputed: int = 0
    retained: int = 0
    accumulator: str = ""
    reason: str = ""

"""Models that run parts of themselves a second time in their backward."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_zoo.specimen import MOST_POSES, Place, Specimen, mlp, some_of, species


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(4, 6)
        self.second = nn.Sequential(nn.Linear(6, 6), nn.Dropout(dropout), nn.Tanh())
        self.third = mlp(6, 6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = checkpoint(self.second, self.first(pose), use_reentrant=self.reentrant)
        return checkpoint(self.third, hidden, use_reentrant=self.reentrant)


@species()
def checkpoint_reentrant(place: Place) -> Specimen:
    return Specimen(Checkpointed(reentrant=True), some_of(place.randn(MOST_POSES, 4)))


@species()
def checkpoint_not_reentrant(place: Place) -> Specimen:
    return Specimen(Checkpointed(reentrant=False), some_of(place.randn(MOST_POSES, 4)))


@species(same_in_every_dtype=False)
def checkpoint_reentrant_with_dropout(place: Place) -> Specimen:
    return Specimen(Checkpointed(reentrant=True, dropout=0.5), some_of(place.randn(MOST_POSES, 4)))


@species(same_in_every_dtype=False)
def checkpoint_not_reentrant_with_dropout(place: Place) -> Specimen:
    return Specimen(Checkpointed(reentrant=False, dropout=0.5), some_of(place.randn(MOST_POSES, 4)))


class TiedCheckpoints(nn.Module):
    """The same weight in two reentrant checkpoints gets its gradient in two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose)
        for _ in range(3):
            hidden = checkpoint(self.shared, hidden.tanh(), use_reentrant=True)
        return hidden.sum()


@species(bit_for_bit=False)
def tied_in_reentrant_checkpoints(place: Place) -> Specimen:
    return Specimen(TiedCheckpoints(), some_of(place.randn(MOST_POSES, 4)))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = Checkpointed(reentrant=False)

    def forward(self, pose: Tensor) -> Tensor:
        return checkpoint(self.outer, pose, use_reentrant=False)


@species()
def nested_checkpoints(place: Place) -> Specimen:
    return Specimen(Nested(), some_of(place.randn(MOST_POSES, 4)))


class WholeReentrant(nn.Module):
    """All of it in one reentrant checkpoint, whose input must require grad: it marks a copy, or the pose itself."""

    def __init__(self, *, marks_the_pose: bool) -> None:
        super().__init__()
        self.marks_the_pose = marks_the_pose
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        if not self.marks_the_pose:
            pose = pose.detach()
        return checkpoint(self.net, pose.requires_grad_(), use_reentrant=True)


@species()
def whole_model_in_reentrant_checkpoint(place: Place) -> Specimen:
    return Specimen(WholeReentrant(marks_the_pose=False), some_of(place.randn(MOST_POSES, 4)))


@species()
def whole_model_in_reentrant_checkpoint_that_marks_the_pose(place: Place) -> Specimen:
    return Specimen(WholeReentrant(marks_the_pose=True), some_of(place.randn(MOST_POSES, 4)))


class BranchInCheckpoint(nn.Module):
    """Only high poses use the branch, whose parameters no walk through the graph can see."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.low = nn.Linear(4, 1)
        self.high = nn.Linear(4, 1)

    def forward(self, pose: Tensor, high: bool) -> Tensor:
        hidden = self.first(pose)
        return checkpoint(self.high, hidden, use_reentrant=True) + 9 if high else self.low(hidden)


@species()
def used_by_high_poses_in_reentrant_checkpoint(place: Place) -> Specimen:
    inputs = place.randn(MOST_POSES, 4)
    return Specimen(BranchInCheckpoint(), lambda count: [(row.clone(), i == 3) for i, row in enumerate(inputs[:count])])

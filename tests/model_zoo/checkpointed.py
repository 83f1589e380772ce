"""Models with activation checkpoints, whose backward runs parts of the model again."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, mlp, model_case, rows_of


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


@model_case()
def checkpoint_reentrant(factory: TensorFactory) -> ModelCase:
    return ModelCase(Checkpointed(reentrant=True), rows_of(factory.randn(MOST_POSES, 4)))


@model_case()
def checkpoint_not_reentrant(factory: TensorFactory) -> ModelCase:
    return ModelCase(Checkpointed(reentrant=False), rows_of(factory.randn(MOST_POSES, 4)))


@model_case(same_in_every_dtype=False)
def checkpoint_reentrant_with_dropout(factory: TensorFactory) -> ModelCase:
    return ModelCase(Checkpointed(reentrant=True, dropout=0.5), rows_of(factory.randn(MOST_POSES, 4)))


@model_case(same_in_every_dtype=False)
def checkpoint_not_reentrant_with_dropout(factory: TensorFactory) -> ModelCase:
    return ModelCase(Checkpointed(reentrant=False, dropout=0.5), rows_of(factory.randn(MOST_POSES, 4)))


class TiedCheckpoints(nn.Module):
    """Uses one weight in several reentrant checkpoints, which deliver its gradient in several pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose)
        for _ in range(3):
            hidden = checkpoint(self.shared, hidden.tanh(), use_reentrant=True)
        return hidden.sum()


@model_case(bit_for_bit=False)
def tied_in_reentrant_checkpoints(factory: TensorFactory) -> ModelCase:
    return ModelCase(TiedCheckpoints(), rows_of(factory.randn(MOST_POSES, 4)))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = Checkpointed(reentrant=False)

    def forward(self, pose: Tensor) -> Tensor:
        return checkpoint(self.outer, pose, use_reentrant=False)


@model_case()
def nested_checkpoints(factory: TensorFactory) -> ModelCase:
    return ModelCase(Nested(), rows_of(factory.randn(MOST_POSES, 4)))


class WholeReentrant(nn.Module):
    """Runs in one reentrant checkpoint, whose input must require grad: a copy of the pose, or the pose itself."""

    def __init__(self, *, sets_requires_grad_on_the_pose: bool) -> None:
        super().__init__()
        self.sets_requires_grad_on_the_pose = sets_requires_grad_on_the_pose
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        if not self.sets_requires_grad_on_the_pose:
            pose = pose.detach()
        return checkpoint(self.net, pose.requires_grad_(), use_reentrant=True)


@model_case()
def whole_model_in_reentrant_checkpoint(factory: TensorFactory) -> ModelCase:
    return ModelCase(WholeReentrant(sets_requires_grad_on_the_pose=False), rows_of(factory.randn(MOST_POSES, 4)))


@model_case()
def reentrant_checkpoint_that_sets_requires_grad_on_the_pose(factory: TensorFactory) -> ModelCase:
    return ModelCase(WholeReentrant(sets_requires_grad_on_the_pose=True), rows_of(factory.randn(MOST_POSES, 4)))


class BranchInCheckpoint(nn.Module):
    """Only high poses use one branch, and a walk through the graph does not reach its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.low = nn.Linear(4, 1)
        self.high = nn.Linear(4, 1)

    def forward(self, pose: Tensor, high: bool) -> Tensor:
        hidden = self.first(pose)
        return checkpoint(self.high, hidden, use_reentrant=True) + 9 if high else self.low(hidden)


@model_case()
def used_by_high_poses_in_reentrant_checkpoint(factory: TensorFactory) -> ModelCase:
    inputs = factory.randn(MOST_POSES, 4)
    return ModelCase(
        BranchInCheckpoint(), lambda count: [(row.clone(), i == 3) for i, row in enumerate(inputs[:count])]
    )

"""A group on several ranks: what one of them cannot do, all refuse, and everything is as before."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import Fault, on_ranks
from torch import Tensor, nn

import gradhooks
from gradhooks.testing import full_graph

ACCUMULATORS = ("stream", "recompute", "store")


class Fragile(nn.Module):
    """Counts its calls in a buffer, draws random numbers, and fails at the call that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 1)
        self.calls = 0
        self.fails_at: int | None = None
        self.error: BaseException = ValueError("this pose is broken")
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, pose: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        torch.rand(())
        if self.calls == self.fails_at:
            raise self.error
        prediction: Tensor = self.readout(pose)
        return prediction


def poses_of_rank(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return list(torch.randn(3 + rank, 4, generator=generator, dtype=torch.float64))


def new_scorer(combination: Any = "boltzmann", model: nn.Module | None = None, **options: Any) -> gradhooks.MultiPose:
    torch.manual_seed(0)
    model = Fragile().double() if model is None else model
    return gradhooks.MultiPose(model, combination, process_group=dist.group.WORLD, **options)


def of_both(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum() + prediction.per_pose.tanh().mean()


def after_a_fault(rank: int, fails_at: int, accumulator: str) -> list[Any]:
    """The message of the fault on this rank; the deviation of the next group from one process."""
    scorer = new_scorer(accumulator=accumulator)
    model: Any = scorer.model
    model.readout.weight.grad = torch.ones_like(model.readout.weight)
    before = copy.deepcopy((model.state_dict(), model.readout.weight.grad, torch.get_rng_state()))
    model.fails_at = fails_at if rank == 1 else None
    with pytest.raises(gradhooks.errors.DistributedError) as caught:
        of_both(scorer(poses_of_rank(rank))).backward()
    in_backward = model.calls > len(poses_of_rank(rank))
    model.fails_at = None
    state, gradient, drawn = before
    assert torch.equal(model.readout.weight.grad, gradient)
    if not in_backward:
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), drawn)
    assert isinstance(caught.value.__cause__, ValueError) == (rank == 1)
    reference = copy.deepcopy(model)
    reference.readout.weight.grad = gradient.clone()
    of_both(scorer(poses_of_rank(rank))).backward()
    poses = [pose for each in range(2) for pose in poses_of_rank(each)]
    of_both(full_graph(reference, poses, gradhooks.combinations.Boltzmann())).backward()
    deviation = (model.readout.weight.grad - reference.readout.weight.grad).abs().max().item()
    return [str(caught.value), deviation]


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_rank_that_fails_in_its_forward_stops_all(fails_at: int, accumulator: str) -> None:
    for message, deviation in on_ranks(after_a_fault, fails_at, accumulator):
        assert "rank 1 of 2: ValueError: this pose is broken" in message
        assert deviation <= 1e-12


@pytest.mark.parametrize("accumulator", ["stream", "recompute"])  # both run poses again, for the loss that sees them
@pytest.mark.parametrize("fails_at", [5, 7])
def test_a_rank_that_fails_in_its_backward_stops_all(fails_at: int, accumulator: str) -> None:
    for message, deviation in on_ranks(after_a_fault, fails_at, accumulator):
        assert "failed in its backward" in message
        assert "rank 1 of 2: ValueError: this pose is broken" in message
        assert deviation <= 1e-12


def interrupted(rank: int) -> None:
    scorer = new_scorer()
    model: Any = scorer.model
    model.error, model.fails_at = KeyboardInterrupt(), (2 if rank == 0 else None)
    scorer(poses_of_rank(rank))


def test_an_interrupt_goes_through_on_its_rank_and_stops_the_others() -> None:
    here, there = on_ranks(interrupted, keep_faults=True)
    assert here.kind == "KeyboardInterrupt"
    assert there.kind == "DistributedError"
    assert "rank 0 of 2: KeyboardInterrupt" in there.message


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 1, sparse=True)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.table(pose.argmax())
        return prediction


def another_loss(rank: int) -> None:
    (new_scorer()(poses_of_rank(rank)).combined * (1 + rank)).sum().backward()


def another_shape(rank: int) -> None:
    new_scorer(call=lambda model, pose: model(pose).expand(1 + rank))(poses_of_rank(rank))


def another_type(rank: int) -> None:
    new_scorer(call=lambda model, pose: model(pose).to([torch.float32, torch.float64][rank]))(poses_of_rank(rank))


def no_poses(_: int) -> None:
    new_scorer()([])


def no_group(rank: int) -> None:
    new_scorer()(poses_of_rank(rank) if rank == 0 else 3)


def inputs_that_require_grad(rank: int) -> None:
    new_scorer()([pose.requires_grad_() for pose in poses_of_rank(rank)])


def nothing_to_train(rank: int) -> None:
    new_scorer(call=lambda model, pose: model(pose).detach())(poses_of_rank(rank))


def sparse_gradients(rank: int) -> None:
    new_scorer(model=Sparse().double())(poses_of_rank(rank)).combined.sum().backward()


def combined_gradients(rank: int) -> None:
    class Clipped(gradhooks.GradientCombination):
        def forward(self, predictions: Tensor) -> Tensor:
            return predictions.mean(0)

    new_scorer(Clipped(), accumulator="store")(poses_of_rank(rank))


def not_a_member(rank: int) -> None:
    groups = [dist.new_group([0]), dist.new_group([1])]
    gradhooks.MultiPose(Fragile(), process_group=groups[1 - rank])


def pickled(_: int) -> None:
    pickle.dumps(new_scorer())


REFUSALS: dict[Callable[..., None], tuple[str, str]] = {
    another_loss: ("DistributedError", "rank 1 has computed another loss than rank 0.*the same target"),
    another_shape: ("PredictionError", r"rank 0: shape \(1,\).*rank 1: shape \(2,\)"),
    another_type: ("PredictionError", r"rank 0: .*float32.*rank 1: .*float64"),
    no_poses: ("PosesError", "empty on every rank"),
    no_group: ("DistributedError", "rank 1 of 2: PosesError.*got one int"),
    inputs_that_require_grad: ("DistributedError", "PosesError: a pose requires grad.*detach"),
    nothing_to_train: ("PredictionError", "no prediction of the 7 poses requires grad"),
    sparse_gradients: ("DistributedError", "sparse=False"),
    combined_gradients: ("DistributedError", "CombinationError.*without process_group"),
    not_a_member: ("DistributedError", "not in the process_group"),
    pickled: ("TypeError", r"state_dict\(\)"),
}


@pytest.mark.parametrize("refused", REFUSALS, ids=lambda refused: refused.__name__)
def test_every_rank_refuses_with_the_cause(refused: Callable[..., None]) -> None:
    kind, cause = REFUSALS[refused]
    for fault in on_ranks(refused, keep_faults=True):
        assert isinstance(fault, Fault)
        assert fault.kind == kind
        pytest.raises(Exception, match=cause).matches(Exception(fault.message))


def copied(rank: int) -> float:
    """A copy, as for an average of the weights, shares the poses with the same ranks."""
    scorer = copy.deepcopy(new_scorer())
    combined = scorer(poses_of_rank(rank)).combined
    return combined.item()


def test_a_copy_shares_with_the_same_ranks() -> None:
    here, there = on_ranks(copied)
    assert here == there

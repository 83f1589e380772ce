"""Pose parallel with faults: if one rank fails, all ranks raise, and models are unchanged."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import error_of, log_messages, run_on_ranks
from torch import Tensor, nn
from unwatched import Unwatched

import gradhooks
from gradhooks.testing import full_graph


class Fragile(nn.Module):
    """Counts its calls in a buffer, draws random numbers, and raises in call number `fails_at`."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 1)
        self.log = Unwatched(calls=0)
        self.fails_at: int | None = None
        self.error: BaseException = ValueError("this pose is broken")
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, pose: Tensor) -> Tensor:
        self.log.calls += 1
        self.seen += 1
        torch.rand(())
        if self.log.calls == self.fails_at:
            raise self.error
        prediction: Tensor = self.readout(pose)
        return prediction


class SparseEmbedding(nn.Module):
    """Has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 1, sparse=True)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.table(pose.argmax())
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


def fail_and_continue(rank: int, fails_at: int, accumulator: str) -> tuple[str, float]:
    """Let rank 1 fail; return this rank's message, and the deviation of the next group from a single process."""
    scorer = new_scorer(accumulator=accumulator, audit=False)
    model: Any = scorer.model
    model.readout.weight.grad = torch.ones_like(model.readout.weight)
    before = copy.deepcopy((model.state_dict(), model.readout.weight.grad, torch.get_rng_state()))
    model.fails_at = fails_at if rank == 1 else None
    with pytest.raises(gradhooks.errors.DistributedError) as caught, log_messages() as messages:
        of_both(scorer(poses_of_rank(rank))).backward()
    assert any("rank 1 of 2: ValueError: this pose is broken" in message for message in messages)
    in_backward = model.log.calls > len(poses_of_rank(rank))
    model.fails_at = None
    state, gradient, random_state = before
    assert torch.equal(model.readout.weight.grad, gradient)
    if not in_backward:
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(caught.value.__cause__, ValueError) == (rank == 1)
    reference = copy.deepcopy(model)
    reference.readout.weight.grad = gradient.clone()
    of_both(scorer(poses_of_rank(rank))).backward()
    poses = [pose for each in range(2) for pose in poses_of_rank(each)]
    of_both(full_graph(reference, poses, gradhooks.combinations.Boltzmann())).backward()
    deviation = (model.readout.weight.grad - reference.readout.weight.grad).abs().max().item()
    return str(caught.value), deviation


Results = dict[tuple[int, str], tuple[str, float]]


def fail_repeatedly(rank: int, calls: tuple[int, ...], accumulators: tuple[str, ...]) -> Results:
    return {
        (fails_at, accumulator): fail_and_continue(rank, fails_at, accumulator)
        for fails_at in calls
        for accumulator in accumulators
    }


@pytest.mark.parametrize(
    ("step", "calls", "accumulators"),
    [
        ("forward", (1, 2, 4), ("stream", "recompute", "store")),
        ("backward", (5, 7), ("stream", "recompute")),  # both rerun poses for a loss of `per_pose`
    ],
)
def test_a_failing_rank_stops_all_ranks(step: str, calls: tuple[int, ...], accumulators: tuple[str, ...]) -> None:
    for results in run_on_ranks(fail_repeatedly, calls, accumulators):
        assert len(results) == len(calls) * len(accumulators)
        for key, (message, deviation) in results.items():
            assert f"failed in the {step}" in message, key
            assert "rank 1 of 2: ValueError: this pose is broken" in message, key
            assert deviation <= 1e-12, key


def interrupt_rank_0(rank: int) -> tuple[str, str]:
    scorer = new_scorer()
    model: Any = scorer.model
    model.error, model.fails_at = KeyboardInterrupt(), (2 if rank == 0 else None)
    return error_of(scorer, poses_of_rank(rank))


def test_keyboard_interrupt_is_raised_on_its_rank_and_stops_the_others() -> None:
    (kind_0, _), (kind_1, message_1) = run_on_ranks(interrupt_rank_0)
    assert kind_0 == "KeyboardInterrupt"
    assert kind_1 == "DistributedError"
    assert "rank 0 of 2: KeyboardInterrupt" in message_1


def different_loss(rank: int) -> None:
    (new_scorer()(poses_of_rank(rank)).combined * (1 + rank)).sum().backward()


def different_shape(rank: int) -> None:
    new_scorer(call=lambda model, pose: model(pose).expand(1 + rank))(poses_of_rank(rank))


def different_dtype(rank: int) -> None:
    new_scorer(call=lambda model, pose: model(pose).to([torch.float32, torch.float64][rank]))(poses_of_rank(rank))


def too_many_dimensions(rank: int) -> None:
    new_scorer(call=lambda model, pose: model(pose).reshape([1] * 9))(poses_of_rank(rank))


def no_poses(_: int) -> None:
    new_scorer()([])


def not_iterable_on_rank_1(rank: int) -> None:
    new_scorer()(poses_of_rank(rank) if rank == 0 else 3)


def poses_that_require_grad(rank: int) -> None:
    new_scorer()([pose.requires_grad_() for pose in poses_of_rank(rank)])


def nothing_to_train(rank: int) -> None:
    new_scorer(call=lambda model, pose: model(pose).detach())(poses_of_rank(rank))


def sparse_gradients(rank: int) -> None:
    new_scorer(model=SparseEmbedding().double())(poses_of_rank(rank)).combined.sum().backward()


def gradient_combination(rank: int) -> None:
    class Clipped(gradhooks.GradientCombination):
        def forward(self, predictions: Tensor) -> Tensor:
            return predictions.mean(0)

    new_scorer(Clipped(), accumulator="store")(poses_of_rank(rank))


def not_a_member(rank: int) -> None:
    groups = [dist.new_group([0]), dist.new_group([1])]
    gradhooks.MultiPose(Fragile(), process_group=groups[1 - rank])([torch.zeros(4)])


def pickling(_: int) -> None:
    pickle.dumps(new_scorer())


REFUSALS: dict[Callable[..., None], tuple[str, str]] = {
    different_loss: ("DistributedError", "rank 1 computed a different loss than rank 0.*the same target"),
    different_shape: ("PredictionError", r"rank 0: shape \(1,\).*rank 1: shape \(2,\)"),
    different_dtype: ("PredictionError", r"rank 0: .*float32.*rank 1: .*float64"),
    too_many_dimensions: ("DistributedError", "PredictionError: cannot gather predictions.*at most 8 dimensions"),
    no_poses: ("PosesError", "no poses on any rank"),
    not_iterable_on_rank_1: ("DistributedError", "rank 1 of 2: PosesError.*got one int"),
    poses_that_require_grad: ("DistributedError", "PosesError: a pose requires grad.*detach"),
    nothing_to_train: ("PredictionError", "no prediction of the 7 poses requires grad"),
    sparse_gradients: ("DistributedError", "sparse=False"),
    gradient_combination: ("DistributedError", "CombinationError.*without process_group"),
    not_a_member: ("DistributedError", "process_group does not contain this process"),
    pickling: ("TypeError", r"state_dict\(\)"),
}


def refuse_all(rank: int) -> dict[str, tuple[str, str]]:
    return {refused.__name__: error_of(refused, rank) for refused in REFUSALS}


def test_every_rank_refuses_with_the_cause() -> None:
    expected = {refused.__name__: kind for refused, (kind, _) in REFUSALS.items()}
    for errors in run_on_ranks(refuse_all):
        assert {name: kind for name, (kind, _) in errors.items()} == expected
        for refused, (_, cause) in REFUSALS.items():
            _, message = errors[refused.__name__]
            assert re.search(cause, message), message


def run_a_copy(rank: int) -> float:
    """Copy a scorer, as averaging of parameters does, and run the copy."""
    scorer = copy.deepcopy(new_scorer())
    combined = scorer(poses_of_rank(rank)).combined
    return combined.item()


def test_a_copy_uses_the_same_process_group() -> None:
    first, second = run_on_ranks(run_a_copy)
    assert first == second

"""chunk_size="auto" finds a size that fits, and no group is lost when memory runs out."""
# ruff: noqa: ARG004

import copy
import gc
from typing import Any

import pytest
import torch
from model_zoo import TensorFactory
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_both,
)
from unwatched import Unwatched

import gradhooks
from gradhooks.engine.memory_budget import ran_out_of_memory
from gradhooks.testing import full_graph

COUNT = 10


class OutOfMemoryInBackward(torch.autograd.Function):
    """The identity; runs out of memory in the backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("simulated")


class LimitedMemory(nn.Module):
    """Runs out of memory if the poses of a chunk cost more than a limit.

    Attributes:
        where: "forward", "graph" (a forward in grad mode) or "backward".
        log: `limit`, the cost that fits (a pose costs 1 unless it brings its cost); the size of each chunk that ran.
    """

    def __init__(self, limit: float, where: str = "forward", inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), inner or nn.Tanh(), nn.Linear(6, 1)
        self.where = where
        self.log = Unwatched(limit=limit, chunk_sizes=[])

    def forward(self, features: Tensor, cost: Tensor | None = None) -> Tensor:
        features = torch.atleast_2d(features)
        self.log.chunk_sizes.append(len(features))
        # Layers have run and state has changed before memory runs out.
        hidden = self.inner(self.first(features))
        if (len(features) if cost is None else cost.sum().item()) > self.log.limit:
            if self.where == "forward" or (self.where == "graph" and torch.is_grad_enabled()):
                raise torch.OutOfMemoryError("simulated")
            if self.where == "backward" and hidden.requires_grad:
                hidden = hidden + 0 * OutOfMemoryInBackward.apply(self.first.weight).sum()
        return self.last(hidden)


def full_graph_gradients(model: nn.Module, poses: Any, combination: str = "boltzmann") -> Gradients:
    model = copy.deepcopy(model)
    model.log.limit = float("inf")
    model.zero_grad()
    loss_on_both(full_graph(model, list(poses), COMBINATIONS[combination]())).backward()
    return gradients_of(dict(model.named_parameters()))


def train(scorer: gradhooks.MultiPose, poses: Any) -> Gradients:
    scorer.model.zero_grad()
    loss_on_both(scorer(poses)).backward()
    return gradients_of(dict(scorer.model.named_parameters()))


@pytest.mark.parametrize("combination", ["mean", "boltzmann", "attention"])
@pytest.mark.parametrize("where", ["forward", "graph", "backward"])
def test_a_group_survives_running_out_of_memory(where: str, combination: str, double: TensorFactory) -> None:
    model = LimitedMemory(4, where).to(double.device, double.dtype)
    poses = double.randn(COUNT, 4)
    expected = full_graph_gradients(model, poses, combination)
    for accumulator in ACCUMULATORS:
        model.log.chunk_sizes.clear()
        scorer = gradhooks.MultiPose(model, COMBINATIONS[combination](), accumulator=accumulator, chunk_size="auto")
        with case_label(accumulator):
            assert_same_gradients(train(scorer, poses), expected, tolerance=1e-10)
            assert model.log.chunk_sizes[:4] == [2, 10, 5, 3]  # 2 to measure; then halves, rounded up
            assert max(model.log.chunk_sizes[4:]) == 3
            assert scorer.report.poses == COUNT
            model.log.chunk_sizes.clear()
            assert_same_gradients(train(scorer, poses), expected, tolerance=1e-10)
            assert max(model.log.chunk_sizes) == 3  # the next group starts with the size that fitted
            assert_same_gradients(train(copy.deepcopy(scorer), poses), expected, tolerance=1e-10)


def collate_with_costs(poses: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([features for features, _ in poses]), torch.stack([cost for _, cost in poses])


@pytest.mark.parametrize("where", ["forward", "graph", "backward"])
def test_running_out_of_memory_late_in_a_group(where: str, double: TensorFactory) -> None:
    model = LimitedMemory(6.5, where).to(double.device, double.dtype)
    costs = torch.tensor([1.0] * 9 + [3.0] * 3).to(double.device)
    poses = list(zip(double.randn(12, 4), costs, strict=True))
    expected = full_graph_gradients(model, poses)
    for accumulator in ACCUMULATORS:
        model.log.chunk_sizes.clear()
        scorer = gradhooks.MultiPose(
            model, "boltzmann", accumulator=accumulator, chunk_size="auto", collate=collate_with_costs
        )
        with case_label(accumulator):
            for _ in range(3):
                assert_same_gradients(train(scorer, poses), expected, tolerance=1e-10)
            # The six poses of the first chunk fit, the last three do not.
            assert [size for size in model.log.chunk_sizes if size > 3][:2] == [12, 6]
            assert scorer.report.backwards + scorer.report.skipped >= 12


@pytest.mark.parametrize("inner", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(6)], ids=["dropout", "batch norm"])
@pytest.mark.parametrize("where", ["forward", "graph", "backward"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_failed_attempt_leaves_no_trace_in_the_state(
    accumulator: str, where: str, inner: Any, double: TensorFactory
) -> None:
    def state_after(size: Any, limit: int) -> tuple[Gradients, dict[str, Tensor], Tensor]:
        manual_seed(5)
        model = LimitedMemory(limit, where, inner()).to(double.device, double.dtype)
        poses = double.randn(COUNT + 2, 4)
        scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size=size)
        manual_seed(6)
        return train(scorer, poses), dict(model.named_buffers()), torch.get_rng_state()

    gradients, buffers, random_state = state_after("auto", limit=4)
    expected_gradients, expected_buffers, expected_random_state = state_after(3, limit=99)
    assert_same_gradients(gradients, expected_gradients, tolerance=1e-12)
    assert all(torch.equal(buffers[name], expected_buffers[name]) for name in expected_buffers)
    assert torch.equal(random_state, expected_random_state)


def test_a_chunk_with_random_numbers_cannot_be_split_in_its_second_run(double: TensorFactory) -> None:
    """Memory is lost between forward and backward. The next group starts with smaller chunks."""
    model = LimitedMemory(99, "graph", nn.Dropout(0.5)).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", chunk_size="auto")
    poses = double.randn(8, 4)
    prediction = scorer(poses)
    model.log.limit = 4
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        loss_on_both(prediction).backward()
    model.log.chunk_sizes.clear()
    train(scorer, poses)
    assert max(model.log.chunk_sizes) == 4


@pytest.mark.parametrize("where", ["graph", "backward"])
def test_any_other_chunk_is_split_in_its_second_run(where: str, double: TensorFactory) -> None:
    model = LimitedMemory(99, where).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", chunk_size="auto")
    poses = double.randn(8, 4)
    expected = full_graph_gradients(model, poses)
    prediction = scorer(poses)
    model.log.limit = 4
    loss_on_both(prediction).backward()
    assert_same_gradients(gradients_of(dict(model.named_parameters())), expected, tolerance=1e-10)
    assert (scorer.report.backwards, scorer.report.recomputed) == (8, 8)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_one_pose_that_does_not_fit_is_an_error(accumulator: str, where: str, double: TensorFactory) -> None:
    model = LimitedMemory(0.5, where).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size="auto")
    gc.collect()
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            train(scorer, double.randn(COUNT, 4))
    assert all(leaf.grad is None and not leaf._post_accumulate_grad_hooks for leaf in model.parameters())
    model.log.limit = 4
    poses = double.randn(COUNT, 4)
    assert_same_gradients(train(scorer, poses), full_graph_gradients(model, poses), tolerance=1e-10)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_fixed_size_is_not_reduced(accumulator: str, double: TensorFactory) -> None:
    model = LimitedMemory(4).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size=5)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        scorer(double.randn(COUNT, 4))


def test_failures_leave_no_tensors_alive(double: TensorFactory) -> None:
    model = LimitedMemory(4, "backward").to(double.device, double.dtype)
    poses = double.randn(COUNT, 4)
    gc.disable()
    try:
        alive = []
        for _ in range(4):
            for accumulator in ACCUMULATORS:
                scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size="auto")
                train(scorer, poses)
                del scorer
            alive.append(sum(type(each) in {Tensor, nn.Parameter} for each in gc.get_objects()))
        assert alive[-1] == alive[1]
    finally:
        gc.enable()


def test_prediction_without_gradients_in_chunks_that_fit(double: TensorFactory) -> None:
    model = LimitedMemory(4, inner=nn.BatchNorm1d(6)).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, chunk_size="auto")
    model.eval()
    poses = double.randn(COUNT, 4)
    with torch.no_grad():
        predictions = scorer(poses).per_pose
        model.log.limit = 99
        torch.testing.assert_close(predictions, model(poses))
    assert model.log.chunk_sizes[:6] == [2, 10, 5, 3, 3, 3]


def test_which_errors_mean_out_of_memory() -> None:
    assert ran_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradhooks.MultiPose(LimitedMemory(4), chunk_size="auto")(torch.randn(4, 3))


def test_a_size_that_cannot_be_allocated_means_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert ran_out_of_memory(caught.value)

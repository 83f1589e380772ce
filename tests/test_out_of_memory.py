"""A batch that runs out of memory starts again with half of the memory and smaller chunks, and stays exact."""

import copy
import gc
from typing import Any

import pytest
import torch
from limited_memory import LimitedMemory
from model_zoo import TensorFactory
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    CONCRETE_ACCUMULATORS,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    loss_on_both,
)

import gradhooks
from gradhooks.engine.memory_budget import ran_out_of_memory
from gradhooks.testing import full_graph

COUNT = 10
FORWARDS = ["forward", "graph"]
"""Where a forward runs out of memory. "auto", by default without interception, cannot repeat the user's backward."""


def full_graph_gradients(model: nn.Module, poses: Any, combination: str = "boltzmann") -> Gradients:
    model = copy.deepcopy(model)
    model.device.limit = float("inf")
    model.zero_grad()
    loss_on_both(full_graph(model, list(poses), COMBINATIONS[combination]())).backward()
    return gradients_of(dict(model.named_parameters()))


def train(scorer: gradhooks.MultiPose[Any], poses: Any) -> Gradients:
    scorer.model.zero_grad()
    loss_on_both(scorer(poses)).backward()
    return gradients_of(dict(scorer.model.named_parameters()))


CASES = [*((name, where) for name in ACCUMULATORS for where in FORWARDS)]
CASES += [(name, "backward") for name in CONCRETE_ACCUMULATORS]


@pytest.mark.parametrize("combination", ["mean", "boltzmann", "attention"])
@pytest.mark.parametrize(("accumulator", "where"), CASES)
def test_a_batch_survives_running_out_of_memory(
    accumulator: str, where: str, combination: str, double: TensorFactory
) -> None:
    model = LimitedMemory(4, where).to(double.device, double.dtype)
    poses = double.randn(COUNT, 4)
    expected = full_graph_gradients(model, poses, combination)
    scorer = gradhooks.MultiPose(model, COMBINATIONS[combination](), accumulator=accumulator)
    assert_same_gradients(train(scorer, poses), expected, tolerance=1e-10)
    assert max(model.chunk_sizes) > 4  # it failed
    assert scorer.report.poses == COUNT
    assert model.device.most <= 4
    model.chunk_sizes.clear()
    assert_same_gradients(train(scorer, poses), expected, tolerance=1e-10)
    assert max(model.chunk_sizes) <= 4  # the next batch starts with the size that fitted
    assert_same_gradients(train(copy.deepcopy(scorer), poses), expected, tolerance=1e-10)
    assert model.device.used == 0


@pytest.mark.parametrize("where", FORWARDS)
def test_memory_halves_until_the_plain_poses_fit(where: str, double: TensorFactory) -> None:
    model = LimitedMemory(float("inf"), where).to(double.device, double.dtype)
    poses = list(double.randn(4 * COUNT, 4))  # one by one, so that chunks cannot shrink
    expected = full_graph_gradients(model, poses)
    reports = []
    for limit in (100, 20, 8, 1):
        model.device.limit, model.device.most = limit, 0
        scorer = gradhooks.MultiPose(model, "boltzmann")
        with case_label(limit):
            assert_same_gradients(train(scorer, poses), expected, tolerance=1e-10)
        assert model.device.most <= limit
        reports.append(scorer.report)
        limits = [scorer.report.memory.allowed]
        train(scorer, poses)
        assert scorer.report.memory.allowed == limits[0]  # and stays there
    plain, allowed = [report.plain for report in reports], [report.memory.allowed for report in reports]
    assert plain[0] == 4 * COUNT
    assert plain == sorted(plain, reverse=True)
    assert 0 < plain[1] <= 20
    assert plain[-1] <= 1
    assert allowed == sorted(allowed, reverse=True)


def collate_with_costs(poses: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([features for features, _ in poses]), torch.stack([cost for _, cost in poses])


@pytest.mark.parametrize(("accumulator", "where"), CASES)
def test_running_out_of_memory_late_in_a_batch(accumulator: str, where: str, double: TensorFactory) -> None:
    model = LimitedMemory(6.5, where).to(double.device, double.dtype)
    costs = torch.tensor([1.0] * 9 + [3.0] * 3).to(double.device)
    poses = list(zip(double.randn(12, 4), costs, strict=True))
    expected = full_graph_gradients(model, poses)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, collate=collate_with_costs)
    for _ in range(3):
        assert_same_gradients(train(scorer, poses), expected, tolerance=1e-10)
    assert scorer.report.backwards + scorer.report.skipped >= 12
    assert model.device.most <= 6.5
    assert model.device.used == 0


@pytest.mark.parametrize("inner", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(6)], ids=["dropout", "batch norm"])
@pytest.mark.parametrize(("accumulator", "where"), CASES)
def test_a_failed_attempt_leaves_no_trace_in_the_state(
    accumulator: str, where: str, inner: Any, double: TensorFactory
) -> None:
    if accumulator == "recompute" and where != "forward":
        inner = nn.Tanh  # random numbers cannot be split in a second run: the next test
    model = LimitedMemory(4, where, inner()).to(double.device, double.dtype)
    initial = copy.deepcopy(model.state_dict())
    poses = double.randn(COUNT + 2, 4)
    scorer = gradhooks.MultiPose(
        model,
        "boltzmann",
        accumulator=accumulator,
        # The size of chunks of batch normalization, fixed, cannot shrink.
        chunk_size=2 if isinstance(model.inner, nn.BatchNorm1d) else None,
    )

    def train_from_the_start(scorer: Any) -> tuple[Gradients, dict[str, Tensor], Tensor]:
        scorer.model.load_state_dict(initial)
        manual_seed(6)
        return train(scorer, poses), dict(scorer.model.named_buffers()), torch.get_rng_state()

    gradients, buffers, random_state = train_from_the_start(scorer)
    again = copy.deepcopy(scorer)  # it starts with what the first attempts have shown, so that none fails
    again.model.device.limit = float("inf")
    again.model.chunk_sizes.clear()
    expected_gradients, expected_buffers, expected_random_state = train_from_the_start(again)
    assert_same_gradients(gradients, expected_gradients, tolerance=1e-12)
    assert all(torch.equal(buffers[name], expected_buffers[name]) for name in expected_buffers)
    assert torch.equal(random_state, expected_random_state)


def test_a_chunk_with_random_numbers_cannot_be_split_in_its_second_run(double: TensorFactory) -> None:
    """Memory is lost between forward and backward. The next batch starts with smaller chunks."""
    model = LimitedMemory(99, "graph", nn.Dropout(0.5)).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", audit=False)
    poses = double.randn(9, 4)
    prediction = scorer(poses)
    assert max(model.chunk_sizes) == 8  # one to measure, and the rest
    model.device.limit = 4
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        loss_on_both(prediction).backward()
    model.chunk_sizes.clear()
    train(scorer, poses)
    assert max(model.chunk_sizes) <= 4


@pytest.mark.parametrize("where", ["graph", "backward"])
def test_any_other_chunk_is_split_in_its_second_run(where: str, double: TensorFactory) -> None:
    model = LimitedMemory(99, where).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute")
    poses = double.randn(8, 4)
    expected = full_graph_gradients(model, poses)
    prediction = scorer(poses)
    model.device.limit = 4
    loss_on_both(prediction).backward()
    assert_same_gradients(gradients_of(dict(model.named_parameters())), expected, tolerance=1e-10)
    assert (scorer.report.backwards, scorer.report.recomputed) == (8, 8)


@pytest.mark.parametrize(("accumulator", "where"), [case for case in CASES if case[1] != "graph"])
def test_one_pose_that_does_not_fit_is_an_error(accumulator: str, where: str, double: TensorFactory) -> None:
    model = LimitedMemory(0.5, where).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)
    gc.collect()
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            train(scorer, double.randn(COUNT, 4))
    assert all(leaf.grad is None and not leaf._post_accumulate_grad_hooks for leaf in model.parameters())
    model.device.limit = 4
    poses = double.randn(COUNT, 4)
    assert_same_gradients(train(scorer, poses), full_graph_gradients(model, poses), tolerance=1e-10)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_fixed_size_is_not_reduced(accumulator: str, double: TensorFactory) -> None:
    model = LimitedMemory(4).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size=5)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        scorer(double.randn(COUNT, 4))


def test_memory_halves_beside_a_fixed_size(double: TensorFactory) -> None:
    model = LimitedMemory(5).to(double.device, double.dtype)
    poses = double.randn(COUNT, 4)
    expected = full_graph_gradients(model, poses)
    scorer = gradhooks.MultiPose(model, "boltzmann", chunk_size=2)
    assert_same_gradients(train(scorer, poses), expected, tolerance=1e-10)
    assert set(model.chunk_sizes) == {2}
    assert scorer.report.plain <= 4


def test_the_users_backward_runs_out_of_memory_as_in_pytorch(double: TensorFactory) -> None:
    model = LimitedMemory(4, "backward").to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        train(scorer, double.randn(COUNT, 4))
    scorer.memory = 0
    poses = double.randn(COUNT, 4)
    assert_same_gradients(train(scorer, poses), full_graph_gradients(model, poses, "mean"), tolerance=1e-10)


def test_failures_leave_no_tensors_alive(double: TensorFactory) -> None:
    poses = double.randn(COUNT, 4)
    gc.disable()
    try:
        alive = []
        for _ in range(4):
            for accumulator, where in CASES:
                model = LimitedMemory(4, where).to(double.device, double.dtype)
                scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)
                train(scorer, poses)
                del scorer, model
            alive.append(sum(type(each) in {Tensor, nn.Parameter} for each in gc.get_objects()))
        assert alive[-1] == alive[1]
    finally:
        gc.enable()


def test_prediction_without_gradients_in_chunks_that_fit(double: TensorFactory) -> None:
    model = LimitedMemory(4, inner=nn.BatchNorm1d(6)).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model)
    model.eval()
    poses = double.randn(COUNT, 4)
    with torch.no_grad():
        predictions = scorer(poses).per_pose
        model.device.limit = 99
        torch.testing.assert_close(predictions, model(poses))
    # A pair shows that there is a row for each pose; a pose and a pair that no prediction depends on its chunk; one to
    # measure; the rest, halved twice.
    assert model.chunk_sizes[:5] == [2, 1, 2, 1, 9]
    assert set(model.chunk_sizes[5:-1]) <= {5, 3, 1}


def test_which_errors_mean_out_of_memory() -> None:
    assert ran_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradhooks.MultiPose(LimitedMemory(4))(torch.randn(4, 3))


def test_a_size_that_cannot_be_allocated_means_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert ran_out_of_memory(caught.value)

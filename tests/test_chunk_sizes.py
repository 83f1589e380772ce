"""chunk_size="auto" finds what fits and loses no group; what is run again is packed where that changes nothing."""
# ruff: noqa: ARG004

import copy
import gc
from typing import Any

import pytest
import torch
from model_zoo import TensorFactory, mlp
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    Gradients,
    assert_bit_equal,
    assert_same_gradients,
    gradients_of,
    loss_on_both,
)

import gradhooks
from gradhooks.engine.memory_budget import ran_out_of_memory
from gradhooks.testing import full_graph

COUNT = 10


class Failing(torch.autograd.Function):
    """Runs out of memory in the backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("simulated")


class Small(nn.Module):
    """Runs out of memory where the poses that come at once cost more than it has room for.

    Attributes:
        room: What fits.
        where: "forward", "graph" (a forward with grad mode) or "backward".
        seen: How many poses came, each time.
    """

    def __init__(self, room: float, where: str = "forward", inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), inner or nn.Tanh(), nn.Linear(6, 1)
        self.room, self.where = room, where
        self.seen: list[int] = []

    def forward(self, features: Tensor, cost: Tensor | None = None) -> Tensor:
        features = torch.atleast_2d(features)
        self.seen.append(len(features))
        # Some layers have run, state has changed, before the memory is gone.
        hidden = self.inner(self.first(features))
        if (len(features) if cost is None else cost.sum().item()) > self.room:
            if self.where == "forward" or (self.where == "graph" and torch.is_grad_enabled()):
                raise torch.OutOfMemoryError("simulated")
            if self.where == "backward" and hidden.requires_grad:
                hidden = hidden + 0 * Failing.apply(self.first.weight).sum()
        return self.last(hidden)


def expected_of(model: nn.Module, poses: Any, combination: str, loss: Any = loss_on_both) -> Gradients:
    model = copy.deepcopy(model)
    model.room = float("inf")
    model.zero_grad()
    loss(full_graph(model, list(poses), COMBINATIONS[combination]())).backward()
    return gradients_of(dict(model.named_parameters()))


def trained(scorer: gradhooks.MultiPose, poses: Any, loss: Any = loss_on_both) -> Gradients:
    scorer.model.zero_grad()
    loss(scorer(poses)).backward()
    return gradients_of(dict(scorer.model.named_parameters()))


@pytest.mark.parametrize("combination", ["mean", "boltzmann", "attention"])
@pytest.mark.parametrize("where", ["forward", "graph", "backward"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_group_survives_running_out_of_memory(
    accumulator: str, where: str, combination: str, double: TensorFactory
) -> None:
    model = Small(4, where).to(double.device, double.dtype)
    poses = double.randn(COUNT, 4)
    scorer = gradhooks.MultiPose(model, COMBINATIONS[combination](), accumulator=accumulator, chunk_size="auto")
    expected = expected_of(model, poses, combination)
    found = trained(scorer, poses)
    assert_same_gradients(found, expected, tolerance=1e-10)
    assert model.seen[:4] == [2, 10, 5, 3]  # a look at two, then halves, rounded up
    assert max(model.seen[4:]) == 3
    assert scorer.report.poses == COUNT
    model.seen.clear()
    assert_same_gradients(trained(scorer, poses), expected, tolerance=1e-10)
    assert max(model.seen) == 3  # remembered
    assert_same_gradients(trained(copy.deepcopy(scorer), poses), expected, tolerance=1e-10)


@pytest.mark.parametrize("where", ["forward", "graph", "backward"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_running_out_late_in_a_group(accumulator: str, where: str, double: TensorFactory) -> None:
    model = Small(6.5, where).to(double.device, double.dtype)
    costs = torch.tensor([1.0] * 9 + [3.0] * 3).to(double.device)
    poses = list(zip(double.randn(12, 4), costs, strict=True))
    scorer = gradhooks.MultiPose(
        model,
        "boltzmann",
        accumulator=accumulator,
        chunk_size="auto",
        collate=lambda batch: (torch.stack([one for one, _ in batch]), torch.stack([cost for _, cost in batch])),
    )
    expected = expected_of(model, poses, "boltzmann")
    for _ in range(3):
        assert_same_gradients(trained(scorer, poses), expected, tolerance=1e-10)
    # The six of the first chunk fit, the last three do not.
    assert [size for size in model.seen if size > 3][:2] == [12, 6]
    assert scorer.report.backwards + scorer.report.skipped >= 12


@pytest.mark.parametrize("inner", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(6)], ids=["dropout", "batch norm"])
@pytest.mark.parametrize("where", ["forward", "graph", "backward"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_state_is_as_if_nothing_had_failed(accumulator: str, where: str, inner: Any, double: TensorFactory) -> None:
    found = []
    for size in ("auto", 3):
        torch.manual_seed(5)
        model = Small(4 if size == "auto" else 99, where, inner()).to(double.device, double.dtype)
        poses = double.randn(COUNT + 2, 4)
        scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size=size)
        torch.manual_seed(6)
        found.append((trained(scorer, poses), dict(model.named_buffers()), torch.get_rng_state()))
    (gradients, buffers, state), (wanted, wanted_buffers, wanted_state) = found
    assert_same_gradients(gradients, wanted, tolerance=1e-12)
    assert all(torch.equal(buffers[name], wanted_buffers[name]) for name in wanted_buffers)
    assert torch.equal(state, wanted_state)


def test_a_chunk_that_drew_numbers_cannot_be_split_in_its_second_run(double: TensorFactory) -> None:
    """The memory is gone between forward and backward: the next group knows."""
    model = Small(99, "graph", nn.Dropout(0.5)).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", chunk_size="auto")
    poses = double.randn(8, 4)
    prediction = scorer(poses)
    model.room = 4
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        loss_on_both(prediction).backward()
    model.seen.clear()
    trained(scorer, poses)
    assert max(model.seen) == 4


@pytest.mark.parametrize("where", ["graph", "backward"])
def test_any_other_chunk_is_split_in_its_second_run(where: str, double: TensorFactory) -> None:
    model = Small(99, where).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", chunk_size="auto")
    poses = double.randn(8, 4)
    expected = expected_of(model, poses, "boltzmann")
    prediction = scorer(poses)
    model.room = 4
    loss_on_both(prediction).backward()
    assert_same_gradients(gradients_of(dict(model.named_parameters())), expected, tolerance=1e-10)
    assert (scorer.report.backwards, scorer.report.recomputed) == (8, 8)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_one_pose_that_does_not_fit_is_an_error(accumulator: str, where: str, double: TensorFactory) -> None:
    model = Small(0.5, where).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size="auto")
    gc.collect()
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            trained(scorer, double.randn(COUNT, 4))
    assert all(leaf.grad is None and not leaf._post_accumulate_grad_hooks for leaf in model.parameters())
    model.room = 4
    poses = double.randn(COUNT, 4)
    assert_same_gradients(trained(scorer, poses), expected_of(model, poses, "boltzmann"), tolerance=1e-10)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_fixed_size_is_kept_to(accumulator: str, double: TensorFactory) -> None:
    model = Small(4).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size=5)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        scorer(double.randn(COUNT, 4))


def test_nothing_of_a_failure_stays(double: TensorFactory) -> None:
    model = Small(4, "backward").to(double.device, double.dtype)
    poses = double.randn(COUNT, 4)
    gc.disable()
    try:
        alive = []
        for _ in range(4):
            for accumulator in ACCUMULATORS:
                scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, chunk_size="auto")
                trained(scorer, poses)
                del scorer
            alive.append(sum(type(thing) in {Tensor, nn.Parameter} for thing in gc.get_objects()))
        assert alive[-1] == alive[1]
    finally:
        gc.enable()


def test_prediction_in_chunks_that_fit(double: TensorFactory) -> None:
    model = Small(4, inner=nn.BatchNorm1d(6)).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, chunk_size="auto")
    model.eval()
    poses = double.randn(COUNT, 4)
    with torch.no_grad():
        predictions = scorer(poses).per_pose
        model.room = 99
        torch.testing.assert_close(predictions, model(poses))
    assert model.seen[:6] == [2, 10, 5, 3, 3, 3]


def test_a_list_needs_collate(double: TensorFactory) -> None:
    with pytest.raises(gradhooks.errors.PosesError, match="need collate="):
        gradhooks.MultiPose(Small(4), chunk_size="auto")(list(double.randn(4, 4)))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, or 'auto', got 'all'"):
        gradhooks.MultiPose(Small(4), chunk_size="all")


def test_what_is_no_lack_of_memory_goes_through() -> None:
    assert ran_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradhooks.MultiPose(Small(4), chunk_size="auto")(torch.randn(4, 3))


def test_a_size_that_cannot_be_allocated_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert ran_out_of_memory(caught.value)


# -- packing --------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Records how many poses come at once with a graph."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), inner or nn.Tanh(), nn.Linear(6, 1)
        self.seen: list[int] = []

    def forward(self, features: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(len(features))
        return self.last(self.inner(self.first(features)))


def of_some(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.per_pose[[1, 5, 6, 11, 14, 15]].square().sum()


def run_again(model: nn.Module, size: int, loss: Any, poses: Tensor) -> tuple[Gradients, list[int]]:
    """Return the gradients, and the sizes of the chunks of the second run."""
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", chunk_size=size)
    prediction = scorer(poses)
    model.seen.clear()
    loss(prediction).backward()
    return gradients_of(dict(model.named_parameters())), list(model.seen)


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 6), (2, [2] * 3), (4, [4, 2]), (16, [6])])
def test_poses_that_matter_are_packed(size: int, sizes: list[int], double: TensorFactory) -> None:
    model = Counting().to(double.device, double.dtype)
    reference, poses = copy.deepcopy(model), double.randn(16, 4)
    of_some(full_graph(reference, list(poses[:, None]), torch.mean, call=lambda net, pose: net(pose)[0])).backward()
    result, second_sizes = run_again(model, size, of_some, poses)
    assert second_sizes == sizes
    assert_same_gradients(result, gradients_of(dict(reference.named_parameters())))


def test_if_all_poses_matter_the_chunks_and_every_bit_stay(single: TensorFactory) -> None:
    model = Counting().to(single.device, single.dtype)
    reference, poses = copy.deepcopy(model), single.randn(10, 4)
    predictions = torch.cat([reference(poses[start : start + 4]) for start in (0, 4, 8)])
    predictions.square().sum().backward()
    result, second_sizes = run_again(model, 4, lambda prediction: prediction.per_pose.square().sum(), poses)
    assert second_sizes == [2, 4, 4]
    assert_bit_equal(result, gradients_of(dict(reference.named_parameters())))


class BatchScaled(nn.Module):
    """Has no buffer and draws nothing, and yet each row depends on the others."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows / (1 + rows.abs().mean(0))


@pytest.mark.parametrize(
    "inner", [lambda: nn.BatchNorm1d(6), lambda: nn.Dropout(0.5), BatchScaled], ids=["batch norm", "dropout", "mixing"]
)
@pytest.mark.parametrize("size", [4, 2])
def test_chunks_whose_poses_depend_on_each_other_are_not_packed(size: int, inner: Any, double: TensorFactory) -> None:
    torch.manual_seed(1)
    model = Counting(inner()).to(double.device, double.dtype)
    reference, poses = copy.deepcopy(model), double.randn(16, 4)
    torch.manual_seed(2)
    rows = [reference(poses[start : start + size]) for start in range(0, 16, size)]
    torch.cat(rows)[[1, 5, 6, 11, 14, 15]].square().sum().backward()
    for _ in range(2):
        torch.manual_seed(2)
        model.zero_grad()
        result, second_sizes = run_again(model, size, of_some, poses)
        assert_same_gradients(result, gradients_of(dict(reference.named_parameters())))
    assert second_sizes[-1] == size


def test_dependence_on_the_chunk_is_detected_once(double: TensorFactory) -> None:
    model = Counting(BatchScaled()).to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", chunk_size=4)
    poses = double.randn(16, 4)
    runs = []
    for _ in range(3):
        prediction = scorer(poses)
        model.seen.clear()
        of_some(prediction).backward()
        runs.append(list(model.seen))
        assert (scorer.report.backwards, scorer.report.recomputed) == (6, 6)
    assert runs == [[4, 2, 4, 4, 4, 4], [4, 4, 4, 4], [4, 4, 4, 4]]


def test_an_error_names_the_index_of_a_packed_pose(double: TensorFactory) -> None:
    model = Counting().to(double.device, double.dtype)
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", chunk_size=2)
    prediction = scorer(double.randn(16, 4))
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        of_some(prediction).backward()
    if hasattr(caught.value, "__notes__"):
        assert "this was pose 14 of a group of 16" in caught.value.__notes__[0]


def test_a_leaf_of_skipped_poses_alone_gets_zeros_in_any_chunks(double: TensorFactory) -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.usual, self.special = mlp(4, 1), mlp(4, 1)

        def forward(self, features: Tensor) -> Tensor:
            rows = self.usual(features)
            return rows + self.special(features) if (features[:, 0] == 9).any() else rows

    model = Branched().to(double.device, double.dtype)
    poses = double.randn(8, 4)
    poses[2, 0] = 9
    scorer = gradhooks.MultiPose(model, "mean", accumulator="recompute", chunk_size=2)
    scorer(poses).per_pose[5].sum().backward()
    gradients = [leaf.grad for leaf in model.special.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)

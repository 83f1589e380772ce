"""Threads, lazy modules, changed poses, non-finite predictions, progress, long series of groups."""

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from seeding import manual_seed
from torch import Tensor, nn

import gradhooks
from gradhooks.testing import full_graph

ACCUMULATORS = ["store", "stream", "recompute", "auto"]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def random_poses(count: int = 6) -> list[Tensor]:
    return [torch.randn(4, dtype=torch.float64) for _ in range(count)]


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    for leaf, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert (leaf.grad is None) == (expected.grad is None)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-10, atol=1e-13)


def test_two_threads_in_one_model_are_refused() -> None:
    model, inside, leave = mlp(), threading.Event(), threading.Event()

    def wait(model: nn.Module, pose: Tensor) -> Tensor:
        inside.set()
        leave.wait(10)
        return model(pose)

    poses = random_poses()
    reference = copy.deepcopy(model)
    full_graph(reference, poses, gradhooks.combinations.Mean()).combined.sum().backward()
    first = gradhooks.MultiPose(model, call=wait)
    thread = threading.Thread(target=lambda: first(poses).combined.sum().backward())
    thread.start()
    inside.wait(10)
    with pytest.raises(gradhooks.errors.ConcurrentUseError, match="another thread"):
        gradhooks.MultiPose(model)(poses)
    leave.set()
    thread.join()
    assert_same_gradients(model, reference)


def test_a_backward_while_another_thread_runs_a_group_is_refused() -> None:
    model, inside, leave = mlp(), threading.Event(), threading.Event()

    def wait(model: nn.Module, pose: Tensor) -> Tensor:
        inside.set()
        leave.wait(10)
        return model(pose)

    loss = gradhooks.MultiPose(model, accumulator="recompute")(random_poses()).combined.sum()
    thread = threading.Thread(target=lambda: gradhooks.MultiPose(model, call=wait)(random_poses()))
    thread.start()
    inside.wait(10)
    with pytest.raises(gradhooks.errors.ConcurrentUseError, match="another thread"):
        loss.backward()
    leave.set()
    thread.join()
    loss.backward()
    assert model[0].weight.grad is not None


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pose: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(pose)).tanh())).mean(0)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_lazy_modules(accumulator: str) -> None:
    poses = [torch.randn(5, 4) for _ in range(6)]
    model, reference = Lazy(), Lazy()
    manual_seed(3)
    full_graph(reference, poses, gradhooks.combinations.Min(scale=1.0)).combined.sum().backward()
    # The plain first forward draws its masks between the initialisations of the layers; only weights can be compared.
    manual_seed(3)
    gradhooks.MultiPose(model, gradhooks.combinations.Min(scale=1.0), accumulator=accumulator)(
        poses
    ).combined.sum().backward()
    torch.testing.assert_close(model.first.weight, reference.first.weight)
    assert model.training
    assert model.norm.num_batches_tracked == 6
    assert all(leaf.grad is not None for leaf in model.parameters())


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, atoms: dict[str, Tensor]) -> Tensor:
        atoms["positions"].mul_(2)
        return self.linear(atoms["positions"])


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_pose_changed_in_place_is_refused_by_name(accumulator: str) -> None:
    scorer = gradhooks.MultiPose(Writer(), accumulator=accumulator, call=lambda model, pose: model(pose))
    with pytest.raises(gradhooks.errors.PosesError, match=r"pose 0: the model changed pose\['positions'\] in place"):
        scorer([{"positions": torch.randn(4)} for _ in range(3)])


class Undefined(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value = mlp(), value

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.inner(pose)
        return prediction * self.value if pose[0] == 0 else prediction


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("combination", ["mean", "min", "max", "boltzmann"])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_dropped_poses_leave_the_rest_right(accumulator: str, combination: str, value: float) -> None:
    model, poses = Undefined(value), random_poses()
    poses[2][0] = 0
    rest = [pose for index, pose in enumerate(poses) if index != 2]
    reference = copy.deepcopy(model)
    expected = full_graph(reference, rest, gradhooks.registry.combinations.create(combination))
    expected.combined.sum().backward()
    prediction = gradhooks.MultiPose(model, combination, accumulator=accumulator, nonfinite="drop")(poses)
    prediction.combined.sum().backward()
    torch.testing.assert_close(prediction.combined, expected.combined)
    assert_same_gradients(model, reference)
    assert prediction.coefficients()[2] == 0
    assert prediction.per_pose.shape == (6, 1)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_non_finite_predictions_raise_on_request(accumulator: str) -> None:
    model, poses = Undefined(float("nan")), random_poses()
    poses[4][0] = 0
    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, nonfinite="raise")
    with pytest.raises(gradhooks.errors.PredictionError, match="pose 4: its prediction is not finite"):
        scorer(poses)
    with torch.no_grad(), pytest.raises(gradhooks.errors.PredictionError, match="pose 4"):
        scorer(poses)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_non_finite_predictions_propagate_by_default(accumulator: str) -> None:
    model, poses = Undefined(float("nan")), random_poses()
    poses[4][0] = 0
    prediction = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)(poses)
    prediction.combined.sum().backward()
    assert prediction.combined.isnan().all()
    assert all(leaf.grad is not None and leaf.grad.isnan().any() for leaf in model.parameters())


def test_a_group_of_which_nothing_is_left_is_refused() -> None:
    poses = random_poses()
    for pose in poses:
        pose[0] = 0
    with pytest.raises(gradhooks.errors.PredictionError, match="none of the 6 predictions"):
        gradhooks.MultiPose(Undefined(float("nan")), nonfinite="drop")(poses)


def test_progress_tells_of_both_passes() -> None:
    told: list[tuple[int, int]] = []
    scorer = gradhooks.MultiPose(mlp(), accumulator="recompute", progress=lambda *facts: told.append(facts))
    combined = scorer(random_poses(3)).combined
    assert told == [(1, 3), (2, 3), (3, 3)]
    combined.sum().backward()
    assert told[3:] == [(1, 3), (2, 3), (3, 3)]


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    gradhooks.MultiPose(mlp(), progress=True)(random_poses())
    assert "poses" in capsys.readouterr().err


def _live() -> tuple[int, int]:
    gc.collect()
    tensors = [result for result in gc.get_objects() if issubclass(type(result), Tensor)]
    return len(tensors), sum(len(tensor._backward_hooks or ()) for tensor in tensors)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_five_hundred_groups_some_of_them_failing(accumulator: str) -> None:
    model = mlp()

    def sometimes(model: nn.Module, pose: Tensor) -> Tensor:
        if pose[0] > 1.5:
            raise RuntimeError("injected")
        return model(pose)

    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, call=sometimes)
    dropped: list[Any] = []

    def run(count: int) -> None:
        for number in range(count):
            try:
                prediction = scorer(random_poses(3))
            except RuntimeError:
                continue
            if number % 3:
                prediction.combined.sum().backward()
            dropped.append(weakref.ref(prediction.combined))

    run(20)
    _live()  # what earlier tests have left goes now, in however many rounds the collector needs
    before = _live()
    gc.disable()  # what goes without the collector hangs in no cycle
    run(500)
    assert not any(reference() is not None for reference in dropped)
    gc.enable()
    after = _live()
    assert (after[0] <= before[0], after[1]) == (True, before[1])

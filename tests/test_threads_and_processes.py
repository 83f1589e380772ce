"""Threads, forked and spawned processes, asyncio: what is allowed gives the gradient of the full graph."""

import asyncio
import contextlib
import copy
import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_model import assert_gradients_close, small_mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import gradhooks
from gradhooks.testing import full_graph

Step = Callable[[gradhooks.MultiPose], None]


def fixed_poses() -> list[Tensor]:
    return list(torch.linspace(-2, 2, 24, dtype=torch.float64).view(6, 4).sin())


def step(scorer: gradhooks.MultiPose) -> None:
    prediction = scorer(fixed_poses())
    (prediction.combined.square().sum() + prediction.per_pose.tanh().mean()).backward()


def reference_of(model: nn.Module) -> nn.Module:
    reference = copy.deepcopy(model)
    prediction = full_graph(reference, fixed_poses(), gradhooks.combinations.Boltzmann())
    (prediction.combined.square().sum() + prediction.per_pose.tanh().mean()).backward()
    return reference


def in_another_thread(scorer: gradhooks.MultiPose) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(step, scorer).result()


def backward_in_another_thread(scorer: gradhooks.MultiPose) -> None:
    prediction = scorer(fixed_poses())
    loss = prediction.combined.square().sum() + prediction.per_pose.tanh().mean()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()


def in_asyncio(scorer: gradhooks.MultiPose) -> None:
    asyncio.run(asyncio.to_thread(step, scorer))


def beside_a_thread_that_predicts_with_a_copy(scorer: gradhooks.MultiPose) -> None:
    def predict() -> None:
        with torch.no_grad():
            copied(fixed_poses())

    copied = copy.deepcopy(scorer)
    with ThreadPoolExecutor(1) as pool:
        prediction = pool.submit(predict)
        step(scorer)
        prediction.result()


@pytest.mark.parametrize("memory", [0, "1GiB"])
@pytest.mark.parametrize(
    "run", [in_another_thread, backward_in_another_thread, in_asyncio, beside_a_thread_that_predicts_with_a_copy]
)
def test_a_step_in_another_thread(run: Step, memory: str | int) -> None:
    model = small_mlp()
    expected = reference_of(model)
    run(gradhooks.MultiPose(model, "boltzmann", memory=memory))
    assert_gradients_close(model, expected)


@contextlib.contextmanager
def waiting_inside(model: nn.Module, accumulator: str = "auto") -> Iterator[gradhooks.MultiPose]:
    """Run a step of intercepted poses in another thread, which waits inside of the first pose of the batch."""
    inside, leave = threading.Event(), threading.Event()

    def wait(model: nn.Module, pose: Tensor) -> Tensor:
        inside.set()
        leave.wait(10)
        prediction: Tensor = model(pose)
        return prediction

    scorer = gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, audit=False, memory=0)
    scorer.call = wait
    thread = threading.Thread(target=step, args=[scorer])
    thread.start()
    inside.wait(10)
    yield scorer
    leave.set()
    thread.join()


def test_a_backward_of_the_bare_model_while_another_thread_runs_poses() -> None:
    model = small_mlp()
    expected = reference_of(model)
    pose = fixed_poses()[0]
    loss, reference_loss = (each(pose).sum() for each in (model, expected))
    with waiting_inside(model):
        loss.backward()
    reference_loss.backward()
    assert_gradients_close(model, expected)


def test_a_step_of_the_bare_model_while_another_thread_runs_poses_is_refused() -> None:
    model = small_mlp()
    errors: list[str] = []

    def run() -> None:
        try:
            step(gradhooks.MultiPose(model, "boltzmann", call=wait, memory=0))
        except gradhooks.errors.PredictionError as error:
            errors.append(str(error))

    inside, leave = threading.Event(), threading.Event()

    def wait(model: nn.Module, pose: Tensor) -> Tensor:
        inside.set()
        leave.wait(10)
        prediction: Tensor = model(pose)
        return prediction

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(10)
    model(fixed_poses()[0]).sum().backward()
    leave.set()
    thread.join()
    assert len(errors) == 1
    assert "calls backward()" in errors[0]


@pytest.mark.parametrize("accumulator", ["store", "stream", "recompute", "auto"])
def test_what_the_bare_model_may_do_while_another_thread_runs_poses(accumulator: str) -> None:
    model = small_mlp()
    expected = reference_of(model)
    pose = fixed_poses()[0]
    with waiting_inside(model, accumulator) as scorer:
        with torch.no_grad():
            model(pose)
        torch.autograd.grad(model(pose).sum(), list(model.parameters()))
        late = model(pose).sum()
    assert_gradients_close(model, expected)  # nothing of this has reached the poses
    late.backward()
    with pytest.raises(gradhooks.errors.ConcurrentUseError, match="its gradient of 4 parameters is lost"):
        scorer(fixed_poses())
    model.zero_grad()
    step(scorer)
    assert_gradients_close(model, expected)


def test_scorers_on_copies_in_two_threads() -> None:
    models = [small_mlp() for _ in range(2)]
    expected = [reference_of(model) for model in models]
    scorers = [gradhooks.MultiPose(model, "boltzmann", memory=0) for model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(step, scorers):
            pass
    for model, reference in zip(models, expected, strict=True):
        assert_gradients_close(model, reference)


class Predicted(Dataset[Tensor]):
    """Predicts with a scorer when an item is read."""

    def __init__(self, scorer: gradhooks.MultiPose) -> None:
        self.scorer = scorer

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            combined: Tensor = self.scorer([pose + index for pose in fixed_poses()]).combined
        return combined


def test_workers_of_a_data_loader_hold_the_scorer() -> None:
    model = small_mlp()
    expected = reference_of(model)
    scorer = gradhooks.MultiPose(model, "boltzmann", memory=0)
    step(scorer)  # what it has kept must not disturb a forked process
    data = Predicted(scorer)
    loader: Any = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork" if FORKS else "spawn")
    for index, item in enumerate(loader):
        torch.testing.assert_close(item, data[index])
    assert_gradients_close(model, expected)


FORKS = "fork" in multiprocessing.get_all_start_methods() and sys.version_info < (3, 12)  # newer ones warn of threads


def train_pickled(pickled: bytes, results: Any) -> None:
    scorer = pickle.loads(pickled)  # noqa: S301 - written by this test
    step(scorer)
    results.put([parameter.grad.tolist() for parameter in scorer.model.parameters()])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pickled_scorer_in_another_process(method: str) -> None:
    if method == "fork" and not FORKS:
        pytest.skip("this Python warns of every fork of a process with threads")
    model = small_mlp()
    scorer = gradhooks.MultiPose(model, "boltzmann", memory=0)
    expected = reference_of(model)
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=train_pickled, args=(pickle.dumps(scorer), results))
    process.start()
    gradients = results.get(timeout=120)
    process.join()
    for found, parameter in zip(gradients, expected.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(torch.tensor(found, dtype=parameter.dtype), parameter.grad)
    assert all(parameter.grad is None for parameter in model.parameters())

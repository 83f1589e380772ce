"""Two threads cannot run groups through one model at the same time."""

import copy
import threading

import pytest
from small_model import assert_gradients_close, random_poses, small_mlp
from torch import Tensor, nn

import gradhooks
from gradhooks.testing import full_graph


def test_two_threads_in_one_model_are_refused() -> None:
    model, inside, leave = small_mlp(), threading.Event(), threading.Event()

    def wait(model: nn.Module, pose: Tensor) -> Tensor:
        inside.set()
        leave.wait(10)
        return model(pose)

    poses = random_poses()
    reference = copy.deepcopy(model)
    full_graph(reference, poses, gradhooks.combinations.Mean()).combined.sum().backward()
    first = gradhooks.MultiPose(model, call=wait, memory=0)
    thread = threading.Thread(target=lambda: first(poses).combined.sum().backward())
    thread.start()
    inside.wait(10)
    with pytest.raises(gradhooks.errors.ConcurrentUseError, match="another thread"):
        gradhooks.MultiPose(model, memory=0)(poses)
    leave.set()
    thread.join()
    assert_gradients_close(model, reference)


def test_a_backward_while_another_thread_runs_a_group_is_refused() -> None:
    model, inside, leave = small_mlp(), threading.Event(), threading.Event()

    def wait(model: nn.Module, pose: Tensor) -> Tensor:
        inside.set()
        leave.wait(10)
        return model(pose)

    loss = gradhooks.MultiPose(model, accumulator="recompute")(random_poses()).combined.sum()
    thread = threading.Thread(target=lambda: gradhooks.MultiPose(model, call=wait, memory=0)(random_poses()))
    thread.start()
    inside.wait(10)
    with pytest.raises(gradhooks.errors.ConcurrentUseError, match="another thread"):
        loss.backward()
    leave.set()
    thread.join()
    loss.backward()
    assert model[0].weight.grad is not None

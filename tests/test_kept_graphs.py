"""Graphs kept within the option `memory` change the time of a step, and nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn
from training_reference import case_label

import gradhooks
from gradhooks.profiling.peak_memory import PeakMemory
from gradhooks.testing import full_graph

ROWS, WIDTH = 256, 32
GRAPH = 4 * ROWS * WIDTH * 4  # bytes that four layers of the model save for a pose, at least


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        self.layers, self.last = nn.Sequential(*layers), nn.Linear(WIDTH, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.last(self.layers(pose)).mean(0)


def random_poses(count: int) -> list[Tensor]:
    return [torch.randn(ROWS, WIDTH) for _ in range(count)]


@pytest.mark.parametrize("combination", ["mean", "boltzmann", "min"])
def test_gradients_do_not_depend_on_memory(combination: str) -> None:
    model, poses = Deep().double(), [pose.double() for pose in random_poses(7)]
    reference = copy.deepcopy(model)
    combiner = gradhooks.registry.combinations.create(combination)
    full_graph(reference, poses, combiner).combined.sum().backward()
    for accumulator in ("recompute", "auto"):
        for memory in (0, 2 * GRAPH, "1MiB", 0.5):
            model.zero_grad()
            scorer = gradhooks.MultiPose(model, combiner, accumulator=accumulator, memory=memory)
            combined = scorer(poses).combined.sum()
            combined.backward(retain_graph=True)
            combined.backward()
            with case_label(accumulator, memory):
                for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
                    torch.testing.assert_close(parameter.grad, 2 * other.grad, rtol=1e-12, atol=1e-15)
                assert scorer.report.recomputed <= 2 * (7 - scorer.report.graphs_kept)


def test_with_enough_memory_only_the_first_pose_runs_twice() -> None:
    scorer = gradhooks.MultiPose(Deep(), "mean", accumulator="recompute", memory="1GiB")
    scorer(random_poses(7)).combined.sum().backward()
    assert (scorer.report.graphs_kept, scorer.report.recomputed, scorer.report.backwards) == (6, 1, 7)


def test_graphs_of_the_poses_with_the_largest_log_weights_are_kept() -> None:
    minimum = gradhooks.combinations.Min(scale=1.0)
    scorer = gradhooks.MultiPose(Deep(), minimum, accumulator="recompute", memory=int(2.5 * GRAPH), tolerance=0)
    prediction = scorer(random_poses(9))
    assert 1 <= scorer.report.graphs_kept <= 2
    calls: list[int] = []
    scorer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    prediction.combined.sum().backward()
    assert len(calls) == 9 - scorer.report.graphs_kept


@pytest.mark.parametrize("memory", [0, 4 * GRAPH, 8 * GRAPH])
def test_kept_graphs_need_no_more_than_memory(memory: int) -> None:
    model, poses = Deep(), random_poses(16)

    def peak(memory: int) -> int:
        model.zero_grad()
        with PeakMemory() as measured:
            scorer = gradhooks.MultiPose(model, "boltzmann", accumulator="recompute", memory=memory)
            scorer(poses).combined.sum().backward()
        return measured.peak

    assert peak(memory) <= peak(0) + memory + 0.05 * GRAPH


@pytest.mark.parametrize("memory", ["two", "2 XB", -1, 1.5, "1.2.3MB", True])
def test_invalid_memory(memory: str | float) -> None:
    with pytest.raises(ValueError, match="memory must be a number of bytes"):
        gradhooks.MultiPose(Deep(), memory=memory)


def test_memory_that_would_be_ignored_is_refused() -> None:
    for accumulator in ("stream", "store"):
        with pytest.raises(ValueError, match=f"accumulator '{accumulator}' does not use memory="):
            gradhooks.MultiPose(Deep(), accumulator=accumulator, memory="1GiB")


def test_a_result_without_backward_frees_its_graphs() -> None:
    scorer = gradhooks.MultiPose(Deep(), "mean", accumulator="recompute", memory="1GiB")
    poses = random_poses(4)
    with PeakMemory() as once:
        scorer(poses)
    with PeakMemory() as often:
        for _ in range(5):
            scorer(poses)
    assert often.peak <= 1.01 * once.peak

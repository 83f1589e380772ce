"""Recompute(retain=...): graphs kept within a budget change times, and nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gradhooks
from gradhooks.accumulators import Recompute
from gradhooks.profiling.peak_memory import PeakMemory
from gradhooks.testing import full_graph

ROWS, WIDTH = 256, 32
GRAPH = 4 * ROWS * WIDTH * 4  # bytes at least: what four layers of the model save for a pose


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        self.layers, self.last = nn.Sequential(*layers), nn.Linear(WIDTH, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.last(self.layers(pose)).mean(0)


def random_poses(count: int) -> list[Tensor]:
    return [torch.randn(ROWS, WIDTH) for _ in range(count)]


@pytest.mark.parametrize("retain", [None, 0, 2 * GRAPH, "1MiB", 0.5])
@pytest.mark.parametrize("combination", ["mean", "boltzmann", "min"])
def test_gradients_do_not_depend_on_what_is_retained(retain: str | float | None, combination: str) -> None:
    model, poses = Deep().double(), [pose.double() for pose in random_poses(7)]
    reference = copy.deepcopy(model)
    combiner = gradhooks.registry.combinations.create(combination)
    full_graph(reference, poses, combiner).combined.sum().backward()
    scorer = gradhooks.MultiPose(model, combiner, accumulator=Recompute(retain=retain))
    combined = scorer(poses).combined.sum()
    combined.backward(retain_graph=True)
    combined.backward()
    for leaf, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(leaf.grad, 2 * wanted.grad, rtol=1e-12, atol=1e-15)
    assert scorer.report.recomputed <= 2 * (7 - scorer.report.retained)


def test_with_enough_memory_only_the_first_pose_runs_twice() -> None:
    scorer = gradhooks.MultiPose(Deep(), "mean", accumulator=Recompute(retain="1GiB"))
    scorer(random_poses(7)).combined.sum().backward()
    assert (scorer.report.retained, scorer.report.recomputed, scorer.report.backwards) == (6, 1, 7)


def test_the_heaviest_poses_are_retained() -> None:
    scorer = gradhooks.MultiPose(
        Deep(), gradhooks.combinations.Min(scale=1.0), accumulator=Recompute(retain=int(2.5 * GRAPH)), tolerance=0
    )
    prediction = scorer(random_poses(9))
    assert 1 <= scorer.report.retained <= 2
    seen: list[int] = []
    scorer.model.register_forward_pre_hook(lambda *_: seen.append(1))
    prediction.combined.sum().backward()
    assert len(seen) == 9 - scorer.report.retained


@pytest.mark.parametrize("budget", [0, 4 * GRAPH, 8 * GRAPH])
def test_the_budget_is_kept(budget: int) -> None:
    model, poses = Deep(), random_poses(16)

    def peak(accumulator: Recompute) -> int:
        model.zero_grad()
        with PeakMemory() as memory:
            gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator)(poses).combined.sum().backward()
        return memory.peak

    assert peak(Recompute(retain=budget)) <= peak(Recompute()) + budget + 0.05 * GRAPH


@pytest.mark.parametrize("retain", ["two", "2 XB", -1, 1.5, "1.2.3MB"])
def test_bad_budgets(retain: str | float) -> None:
    with pytest.raises(ValueError, match=r"retain takes bytes|could not convert"):
        Recompute(retain=retain)


def test_a_result_dropped_without_backward_frees_its_graphs() -> None:
    scorer = gradhooks.MultiPose(Deep(), "mean", accumulator=Recompute(retain="1GiB"))
    poses = random_poses(4)
    with PeakMemory() as once:
        scorer(poses)
    with PeakMemory() as often:
        for _ in range(5):
            scorer(poses)
    assert often.peak <= 1.01 * once.peak

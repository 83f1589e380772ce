"""Parameters that only skipped poses use get zeros, as in the full graph; parameters that no pose uses get None."""

from typing import Any

import pytest
from model_zoo import TensorFactory
from model_zoo.shared_tensors import branch_for_some_poses
from torch import Tensor, nn
from training_reference import gradients_of, loss_on_combined, trained_leaves

import gradhooks
from gradhooks.engine.unused_parameters import UNUSED_AFTER


@pytest.mark.parametrize("accumulator", ["store", "stream", "recompute", "auto"])
@pytest.mark.parametrize("special", [(0,), (4,), (2, 5), (0, 7)], ids=str)
def test_a_parameter_that_only_skipped_poses_use_gets_zeros(
    special: tuple[int, ...], accumulator: str, double: TensorFactory
) -> None:
    case = branch_for_some_poses(double, special=special, offset=9.0)
    case.model.to(double.device, double.dtype)
    loss_on_combined(gradhooks.MultiPose(case.model, "min", accumulator=accumulator)(case.make_poses(8))).backward()
    gradients = gradients_of(trained_leaves(case, None))
    for name in ("special.0.weight", "special.0.bias", "special.2.weight", "special.2.bias"):
        gradient = gradients[f"model {name}"]
        assert gradient is not None
        assert not gradient.any()
    assert gradients["model unused.weight"] is None
    usual = gradients["model usual.weight"]
    assert usual is not None
    assert usual.any()


def test_the_search_for_unused_parameters_ends(double: TensorFactory) -> None:
    """The search costs a forward of each skipped pose."""
    case = branch_for_some_poses(double, special=(), offset=9.0)
    case.model.to(double.device, double.dtype)
    calls = 0

    def counted(model: nn.Module, pose: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return gradhooks.options.call_model(model, pose)

    scorer = gradhooks.MultiPose(case.model, "min", accumulator="recompute", call=counted, audit=False)
    counts = []
    for _ in range(UNUSED_AFTER + 2):
        calls = 0
        loss_on_combined(scorer(case.make_poses(8))).backward()
        counts.append(calls - scorer.report.recomputed)
    searched = 8 + 8 - scorer.report.recomputed
    assert counts == [searched] * UNUSED_AFTER + [8, 8]

"""Progress of both runs, as a callback or a bar."""

import pytest
from small_model import random_poses, small_mlp

import gradhooks


def test_progress_of_both_runs() -> None:
    calls: list[tuple[int, int]] = []
    scorer = gradhooks.MultiPose(small_mlp(), accumulator="recompute", progress=lambda *call: calls.append(call))
    combined = scorer(random_poses(3)).combined
    assert calls == [(1, 3), (2, 3), (3, 3)]
    combined.sum().backward()
    assert calls[3:] == [(1, 3), (2, 3), (3, 3)]


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    gradhooks.MultiPose(small_mlp(), progress=True)(random_poses())
    printed = capsys.readouterr().err
    assert "poses" in printed
    assert "pose/s" in printed  # the rate, after the remaining time

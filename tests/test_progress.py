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


def test_plain_and_intercepted_poses_have_one_total(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    calls: list[tuple[int, int]] = []
    scorer = gradhooks.MultiPose(small_mlp(), None, memory=700, progress=lambda *call: calls.append(call))
    for _ in range(2):  # the first batch measures
        calls.clear()
        scorer(random_poses(16)).combined.sum().backward()
        assert 0 < scorer.report.plain < 16
    assert calls[:16] == [(done, 16) for done in range(1, 17)]
    intercepted = scorer.report.recomputed  # the second run has a total of its own
    assert calls[16:] == [(done, intercepted) for done in range(1, intercepted + 1)]
    capsys.readouterr()
    scorer.progress = True
    scorer(random_poses(16))
    printed = capsys.readouterr().err
    assert f"{intercepted}/16 " in printed  # where the second bar begins
    assert f"/{intercepted} " not in printed


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    gradhooks.MultiPose(small_mlp(), progress=True)(random_poses())
    printed = capsys.readouterr().err
    assert "poses" in printed
    assert "pose/s" in printed  # the rate, after the remaining time

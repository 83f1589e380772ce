"""Runs examples/digit_bags.py on few bags."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

for _extra in ("matplotlib", "sklearn", "tqdm", "gradhooks_mil", "torchmil"):
    pytest.importorskip(_extra)

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--bags", "12", "--held-out", "8", "--size", "4", "--epochs", "2"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with torch.random.fork_rng():
        yield importlib.import_module("digit_bags")


def test_a_second_run_gives_the_same_results_and_a_plot(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    first = example.main([*TINY, "--output", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["combination", "max", "noisy_or", "ABMIL"]
    again = example.main([*TINY, "--output", str(plot)])
    for result, repeated in zip(first, again, strict=True):
        assert result[:3] == repeated[:3]  # all but the duration
        assert all(torch.equal(*shares) for shares in zip(result.shares, repeated.shares, strict=True))
        assert all(torch.equal(*heat) for heat in zip(result.heat, repeated.heat, strict=True))
    assert [len(result.heat) for result in first] == [0, 0, 8]
    assert all(heat.min() == 0 and heat.max() == 1 for heat in first[-1].heat if len(heat) > 1)


def test_held_out_bags_are_predicted_after_training(example: ModuleType, tmp_path: Path) -> None:
    options = ["--combinations", "noisy_or", "--bags", "80", "--held-out", "80", "--size", "4", "--epochs", "12"]
    (result,) = example.main([*options, "--output", str(tmp_path / "plot.png")])
    assert result.accuracy > 0.8
    assert result.found > 0.8


def test_held_out_images_are_in_no_training_bag(example: ModuleType) -> None:
    training, held_out = example.load_bags(example.parse_arguments(["--bags", "40", "--held-out", "40"]))
    seen = {image.numpy().tobytes() for bag in training for image in bag.images}
    assert not [image for bag in held_out for image in bag.images if image.numpy().tobytes() in seen]
    assert all(bool(bag.label > 0) == bool((bag.digits == example.TARGET_DIGIT).any()) for bag in training + held_out)
    assert [float(bag.label) for bag in held_out[:4]] == [0.0, 1.0, 0.0, 1.0]


def test_invalid_options_are_refused(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--held-out", "1"])
    assert "--held-out must be at least 2" in capsys.readouterr().err

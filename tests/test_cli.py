"""The command line, `python -m gradhooks`."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
from broken_combinations import FirstPose, WrongSign
from torch import Tensor

import gradhooks
from gradhooks import Combination, accumulators, combinations, registry
from gradhooks.cli import main


class Sorted(FirstPose):
    expected_failures: ClassVar[dict[str, str]] = {"check_order_of_poses": "the best pose comes first"}


class Scaled(Combination):
    example_options: ClassVar[dict[str, float]] = {"scale": 2.0}

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, predictions: Tensor) -> Tensor:
        return self.scale * predictions.mean(0)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry.combinations, "_registered", {"wrong_sign": WrongSign, "sorted": Sorted, "scaled": Scaled}
    )


def test_plugins_lists_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    header, *rows = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert header == ["NAME", "KIND", "DISTRIBUTION", "VERSION", "STATE"]
    assert [row[1:3] + row[4:] for row in rows if row[0] == "mean"] == [["combination", "gradhooks", "built in"]]
    assert [row[1:3] + row[4:] for row in rows if row[0] == "store"] == [["accumulator", "gradhooks", "built in"]]


def test_plugins_imports_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(point: EntryPoint) -> None:
        raise AssertionError(f"{point} was imported")

    monkeypatch.setattr(EntryPoint, "load", load)
    assert main(["plugins"]) == 0


def test_plugins_with_check_loads_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--check"]) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["NAME", "KIND", "DISTRIBUTION", "VERSION", "STREAMS", "STATE"]
    assert [row[1:3] + row[4:] for row in rows if row[0] == "mean"] == [["combination", "gradhooks", "yes", "ok"]]
    assert [row[1:3] + row[4:] for row in rows if row[0] == "store"] == [["accumulator", "gradhooks", "-", "ok"]]


def test_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "min"]) == 0
    assert "combination 'min': 15 of 15 checks as expected" in capsys.readouterr().out


def test_check_of_an_accumulator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "recompute"]) == 0
    assert "accumulator 'recompute': 7 of 7 checks" in capsys.readouterr().out


@pytest.mark.usefixtures("_registered")
def test_a_failed_check_sets_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "wrong_sign"]) == 1
    assert "failed  check_stream_declaration: WrongSign declares" in capsys.readouterr().out


@pytest.mark.usefixtures("_registered")
def test_check_gives_the_reason_of_an_expected_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "sorted"]) == 0
    assert "the best pose comes first" in capsys.readouterr().out


@pytest.mark.usefixtures("_registered")
def test_check_uses_the_example_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "scaled"]) == 0
    assert "15 of 15 checks" in capsys.readouterr().out


@pytest.mark.usefixtures("_registered")
def test_check_with_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "scaled", "scale=3"]) == 0
    assert "15 of 15 checks" in capsys.readouterr().out
    assert main(["check", "scaled", "size=3"]) == 2
    assert "has no option 'size'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["check", "scaled", "3"])
    assert "expected OPTION=VALUE, got '3'" in capsys.readouterr().err


def test_check_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "maen"]) == 2
    assert "did you mean 'mean'?" in capsys.readouterr().out


def test_check_of_a_name_of_both_kinds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry.combinations, "_registered", {"both": combinations.Mean})
    monkeypatch.setattr(registry.accumulators, "_registered", {"both": accumulators.Store})
    assert main(["check", "both"]) == 2
    message = "'both' names both a combination and an accumulator; check 'combination:both' or 'accumulator:both'"
    assert message in capsys.readouterr().out
    assert main(["check", "combination:both"]) == 0
    assert "combination 'both': 15 of 15 checks" in capsys.readouterr().out
    assert main(["check", "accumulator:both"]) == 0
    assert "accumulator 'both': 7 of 7 checks" in capsys.readouterr().out


def test_check_with_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "gradhooks:store"]) == 0
    assert main(["check", "combination:gradhooks:store"]) == 2
    assert "unknown combination 'gradhooks:store'" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"gradhooks {gradhooks.__version__}\n"


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradhooks", "check", "nonesuch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "unknown combination or accumulator 'nonesuch'" in done.stdout

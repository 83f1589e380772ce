"""`python -m gradhooks`."""

import subprocess
import sys
from typing import ClassVar

import pytest
from broken_combinations import FirstPose, WrongSign

from gradhooks import registry
from gradhooks.cli import main


class Sorted(FirstPose):
    expected_failures: ClassVar[dict[str, str]] = {"check_order_of_poses": "the best pose comes first"}


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.combinations, "_registered", {"wrong_sign": WrongSign, "sorted": Sorted})


def test_plugins_lists_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["NAME", "KIND", "DISTRIBUTION", "VERSION", "STREAMABLE", "STATE"]
    assert [row[1:3] + row[4:] for row in rows if row[0] == "mean"] == [["combination", "gradhooks", "yes", "ok"]]
    assert [row[1:3] + row[4:] for row in rows if row[0] == "store"] == [["accumulator", "gradhooks", "-", "ok"]]


def test_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "min"]) == 0
    assert "combination 'min': 12 of 12 checks as they should be" in capsys.readouterr().out


def test_check_of_an_accumulator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--accumulator", "recompute"]) == 0
    assert "accumulator 'recompute': 7 of 7 checks" in capsys.readouterr().out


@pytest.mark.usefixtures("_registered")
def test_check_fails_by_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "wrong_sign"]) == 1
    assert "failed  check_stream_declaration: WrongSign declares" in capsys.readouterr().out


@pytest.mark.usefixtures("_registered")
def test_check_gives_the_reason_of_an_expected_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "sorted"]) == 0
    assert "the best pose comes first" in capsys.readouterr().out


def test_check_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "maen"]) == 2
    assert "did you mean 'mean'?" in capsys.readouterr().out


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradhooks", "check", "nonesuch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "unknown combination 'nonesuch'" in done.stdout

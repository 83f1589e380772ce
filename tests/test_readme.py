"""Every code block of the README runs, in order, in one namespace; its commands are the ones that CI runs."""

import re
import sys
import types
from pathlib import Path

import pytest
from trainers import OF_TRAINERS, missing

from gradhooks import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = FENCE.findall(README)


pytestmark = OF_TRAINERS


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_python_blocks_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("lightning", "transformers", "accelerate"):
        pytest.importorskip(package, reason=missing(package))
    monkeypatch.chdir(tmp_path)  # what trainers save
    guide = types.ModuleType("guide")  # what is pickled must be found in a module
    monkeypatch.setitem(sys.modules, "guide", guide)
    monkeypatch.setattr(registry.combinations, "_registered", {})  # what the guide registers goes with it
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert len(blocks) > 5
    for number, code in enumerate(blocks):
        exec(compile(code, f"README.md, block {number}", "exec"), guide.__dict__)  # noqa: S102
    assert "Report(poses=100" in capsys.readouterr().out


def test_every_block_is_accounted_for() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash", "toml"}


def test_commands_name_what_there_is() -> None:
    commands = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
    assert "python -m pytest -n auto" in commands
    for path in re.findall(r"(?:plugins|examples)/[\w./-]+", "\n".join(commands)):
        assert (ROOT / path).exists(), path


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command in ("pip install", "python -m pytest"):
        assert f"from_readme '{command}'" in script
        assert re.search(f"^{command}", README, re.MULTILINE)


def test_relative_paths_in_the_prose_exist() -> None:
    for path in re.findall(r"`((?:gradhooks|plugins|examples|tests)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path


def test_every_trait_names_tests_that_exist() -> None:
    from model_zoo import ZOO  # noqa: PLC0415 - beside this file

    section = README.split("## What holds, and what is refused")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    functions = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(\w+)`", row[2])
        assert named, row
        assert set(named) <= functions | set(ZOO), row

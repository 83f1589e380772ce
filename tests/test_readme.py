"""Each README: its Python blocks run, its commands and links name files that exist, and CI runs its two commands."""

import ast
import importlib.util
import re
import shlex
import sys
import textwrap
import types
from pathlib import Path
from typing import NamedTuple

import pytest
from model_zoo import ZOO
from trainers import OF_TRAINERS, missing

from gradhooks import registry
from gradhooks.options import OPTION_NAMES, Options

ROOT = Path(__file__).parents[1]
READMES = sorted(
    [
        ROOT / "README.md",
        *(
            path
            for folder in ("examples", "plugins", "tests", "gradhooks")
            for path in (ROOT / folder).rglob("README.md")
        ),
    ]
)
LANGUAGES = {"python", "bash", "toml", "text"}

# Packages that are not requirements of the tests and that the blocks of a README import.
PACKAGES = {
    "examples/README.md": ("lightning", "transformers", "accelerate", "torchmil"),
    "plugins/README.md": ("gradhooks_mil", "gradhooks_robust"),
    "plugins/gradhooks-mil/README.md": ("gradhooks_mil",),
    "plugins/gradhooks-robust/README.md": ("gradhooks_robust",),
    "plugins/template/README.md": ("gradhooks_template",),
}

pytestmark = OF_TRAINERS


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_readme = pytest.mark.parametrize("path", READMES, ids=name_of)


class Fence(NamedTuple):
    """A fenced block.

    Attributes:
        line: Number of its first line of code, from 1.
        language: What follows the opening backticks.
        code: The lines between the backticks.
    """

    line: int
    language: str
    code: str


def fences_of(text: str) -> list[Fence]:
    """Return the fenced blocks of a README, also those that are indented."""
    found: list[Fence] = []
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif opened is None:
            opened, lines = (number + 1, line.strip().strip("`")), []
        else:
            found.append(Fence(*opened, textwrap.dedent("\n".join(lines))))
            opened = None
    assert opened is None, f"the block that starts on line {opened[0]} has no end"
    return found


def run_python(fences: list[Fence], readme: str, namespace: dict[str, object]) -> int:
    """Execute the Python blocks in order and return how many there are; errors name the README and its line."""
    blocks = [fence for fence in fences if fence.language == "python"]
    for fence in blocks:
        code = compile("\n" * (fence.line - 1) + fence.code, readme, "exec")
        exec(code, namespace)  # noqa: S102 - the project's own documents
    return len(blocks)


def without_fences(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def missing_paths(text: str, folder: Path) -> list[str]:
    """Return the relative links and the paths in code font that exist neither in `folder` nor in the repository."""
    prose = without_fences(text)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    absent = [link for link in links if link and not (folder / link).exists()]
    named = re.findall(r"`((?:gradhooks|plugins|examples|tests)/[\w./-]+)`", prose)
    return absent + [path for path in named if not ((ROOT / path).exists() or (folder / path).exists())]


def missing_in_commands(fences: list[Fence], folder: Path) -> list[str]:
    """Return the files, folders and modules that commands name and that do not exist."""
    absent = []
    for fence in fences:
        for line in fence.code.splitlines() if fence.language == "bash" else []:
            words = shlex.split(line, comments=True)
            for previous, word in zip(["", *words], words, strict=False):
                if previous == "-m" and " " not in word and importlib.util.find_spec(word) is None:
                    absent.append(word)
                path = re.sub(r"\[.*\]$|::.*$", "", word)
                is_path = re.fullmatch(r"[\w./-]+", path) and ("/" in path or path.endswith(".py"))
                if is_path and not path.startswith((".venv", "-")):
                    absent += [path] * (not any((base / path).exists() for base in (ROOT, folder)))
    return absent


@every_readme
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_python_blocks_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in PACKAGES.get(name_of(path), ()):
        pytest.importorskip(package, reason=missing(package))
    monkeypatch.chdir(tmp_path)  # trainers and plots write files
    guide = types.ModuleType("guide")  # pickle looks classes up in their module
    monkeypatch.setitem(sys.modules, "guide", guide)
    monkeypatch.setattr(registry.combinations, "_registered", {})  # undo what the blocks register
    monkeypatch.setattr(registry.accumulators, "_registered", {})
    run_python(fences_of(path.read_text()), name_of(path), guide.__dict__)


@every_readme
def test_blocks_have_a_known_language(path: Path) -> None:
    assert {fence.language for fence in fences_of(path.read_text())} <= LANGUAGES


@every_readme
def test_commands_name_files_that_exist(path: Path) -> None:
    assert missing_in_commands(fences_of(path.read_text()), path.parent) == []


@every_readme
def test_relative_links_and_paths_exist(path: Path) -> None:
    assert missing_paths(path.read_text(), path.parent) == []


def test_the_main_readme_is_short_and_has_python_blocks() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert sum(fence.language == "python" for fence in fences_of(text)) >= 5


def test_the_first_block_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    fences = fences_of((ROOT / "README.md").read_text())
    first = next(fence for fence in fences if fence.language == "python")
    assert len(first.code.splitlines()) <= 16
    run_python([first], "README.md", {})
    assert re.search(r"poses\s+60\ngroups\s+4", capsys.readouterr().out)


def test_the_table_of_options_is_complete() -> None:
    table = (ROOT / "README.md").read_text().split("## Options of MultiPose")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, re.MULTILINE))
    defaults = {name: getattr(Options(), name) for name in OPTION_NAMES}
    defaults.update(combination="mean", call=None)  # None stands for `call_model`
    assert {name: ast.literal_eval(default) for name, default in listed.items()} == defaults


def test_ci_runs_the_commands_of_the_readme() -> None:
    text, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    setup, main_job, tests = (fence.code.splitlines() for fence in fences_of(text) if fence.language == "bash")
    assert len(setup) == 2
    assert main_job == ["python examples/binding_affinity.py"]
    assert tests == ["python -m pytest -n auto"]
    for command, block in {"pip install": setup, "python -m pytest": tests}.items():
        assert f"from_readme '{command}'" in script
        # .ci/run takes the first line of the file that starts with the command.
        (line, *_) = re.findall(f"^{command}.*", text, re.MULTILINE)
        assert line in block


def test_every_row_of_the_table_names_tests_that_exist() -> None:
    table = (ROOT / "tests" / "README.md").read_text().split("## What holds and what is refused")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
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


# -- The checks above find mistakes ----------------------------------------------------------------------------------

BROKEN = """
```python
number = 1
```

See [the guide](no/such/file.md) and `gradhooks/no_such_file.py`, or [a page](https://example.org/no/page).

    indented text is no block

- In a list:

  ```python
  number += 0
  ```

```python
assert number == 2
```

```bash
python examples/no_such_example.py --molecules 8
python -m no_such_module
python examples/binding_affinity.py
```
"""


def test_a_broken_block_is_found() -> None:
    fences = fences_of(BROKEN)
    assert [fence.line for fence in fences] == [3, 13, 17, 21]
    namespace: dict[str, object] = {}
    with pytest.raises(AssertionError) as fault:
        run_python(fences, "BROKEN.md", namespace)
    assert namespace["number"] == 1
    assert (fault.traceback[-1].path, fault.traceback[-1].lineno) == ("BROKEN.md", 16)  # counted from 0
    with pytest.raises(AssertionError, match="starts on line 2 has no end"):
        fences_of("```python\nnumber = 1\n")


def test_missing_files_and_modules_are_found() -> None:
    assert missing_paths(BROKEN, ROOT) == ["no/such/file.md", "gradhooks/no_such_file.py"]
    assert missing_in_commands(fences_of(BROKEN), ROOT) == ["examples/no_such_example.py", "no_such_module"]

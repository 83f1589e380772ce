"""The template under another name: built, installed in a fresh environment, and used by name."""

import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parent.parent / "plugins" / "template"
RENAMED = {
    "gradhooks-template": "acme-pooling",
    "gradhooks_template": "acme_pooling",
    "risk_averse": "cautious",
    "RiskAverse": "Cautious",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling builds the wheel: pip install hatchling"
)


def run(*command: object) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def renamed(text: str) -> str:
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return text


def copy_template(target: Path) -> None:
    """Copy and rename the template as its README describes."""
    for path in TEMPLATE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix in (".py", ".toml", ".md", ".typed"):
            copy = target / renamed(str(path.relative_to(TEMPLATE)))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(renamed(path.read_text()))


def fresh_environment(target: Path) -> Path:
    """Create a virtual environment that also finds the packages of this one, and return its interpreter.

    Not with system_site_packages, which from within a virtual environment gives access to the base installation only.
    """
    venv.create(target, with_pip=False, symlinks=os.name != "nt")
    scheme = {"base": str(target), "platbase": str(target)}
    own = Path(sysconfig.get_path("purelib", vars=scheme))
    # `addsitedir`, not plain paths, so that editable installs are found as well.
    seen = [path for path in [*site.getsitepackages(), sysconfig.get_path("purelib")] if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(seen)]
    (own / "parent.pth").write_text("\n".join(lines) + "\n")
    return Path(sysconfig.get_path("scripts", vars=scheme)) / Path(sys.executable).name


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a fresh environment in which the wheel of the renamed template is installed."""
    if shutil.which("pip") is None and importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("plugin")
    copy_template(folder / "source")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q",
        "-w", folder / "wheels", folder / "source")  # fmt: skip
    (wheel,) = (folder / "wheels").glob("acme_pooling-*.whl")
    interpreter = fresh_environment(folder / "environment")
    run(interpreter, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", "-q", wheel)
    return interpreter


def test_plugin_is_not_installed_here() -> None:
    assert importlib.util.find_spec("acme_pooling") is None


@pytest.fixture(scope="module")
def output(python: Path) -> list[str]:
    """Return what the plugin list, the conformance checks and a training step print, from one process."""
    program = """
import torch, gradhooks
from gradhooks.cli import main
main(["plugins", "--check"])
print("----")
main(["check", "cautious"])
print("----")
scorer = gradhooks.MultiPose(torch.nn.Linear(3, 1), "cautious", accumulator="stream")
scorer(torch.randn(20, 3)).combined.sum().backward()
print(scorer.combination.__class__.__module__, scorer.report.accumulator, scorer.report.recomputed)
"""
    return run(python, "-c", program).split("----")


def test_plugin_is_listed(output: list[str]) -> None:
    (row,) = [line.split() for line in output[0].splitlines() if line.startswith("cautious ")]
    assert {"combination", "acme-pooling", "0.1.0", "yes", "ok"} <= set(row)


def test_plugin_passes_the_conformance_kit(output: list[str]) -> None:
    assert "15 of 15 checks" in output[1]


def test_plugin_is_streamed(output: list[str]) -> None:
    assert output[2].split() == ["acme_pooling.cautious", "stream", "0"]


def test_tests_of_the_plugin_pass(python: Path) -> None:
    source = python.parents[2] / "source"
    assert " passed" in run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", source)

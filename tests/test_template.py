"""A stranger's distribution: the template under another name, built, installed in a fresh environment, used by name."""

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
    """As the template's README says."""
    for path in TEMPLATE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix in (".py", ".toml", ".md", ".typed"):
            copy = target / renamed(str(path.relative_to(TEMPLATE)))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(renamed(path.read_text()))


def fresh_environment(target: Path) -> Path:
    """A virtual environment that sees what this one has, and its interpreter.

    Not by system_site_packages, which of a virtual environment's interpreter means the packages of its base.
    """
    venv.create(target, with_pip=False, symlinks=os.name != "nt")
    scheme = {"base": str(target), "platbase": str(target)}
    own = Path(sysconfig.get_path("purelib", vars=scheme))
    # `addsitedir`, not bare paths, so that editable installs are seen as well.
    seen = [path for path in [*site.getsitepackages(), sysconfig.get_path("purelib")] if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(seen)]
    (own / "parent.pth").write_text("\n".join(lines) + "\n")
    return Path(sysconfig.get_path("scripts", vars=scheme)) / Path(sys.executable).name


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with a stranger's wheel."""
    if shutil.which("pip") is None and importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("stranger")
    copy_template(folder / "source")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q",
        "-w", folder / "wheels", folder / "source")  # fmt: skip
    (wheel,) = (folder / "wheels").glob("acme_pooling-*.whl")
    interpreter = fresh_environment(folder / "environment")
    run(interpreter, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", "-q", wheel)
    return interpreter


def test_the_plugin_is_nowhere_else() -> None:
    assert importlib.util.find_spec("acme_pooling") is None


def test_it_is_listed(python: Path) -> None:
    rows = [line.split() for line in run(python, "-m", "gradhooks", "plugins").splitlines()]
    assert ["cautious", "combination", "acme-pooling", "0.1.0", "yes", "ok"] in rows


def test_it_passes_the_kit(python: Path) -> None:
    assert "12 of 12 checks as they should be" in run(python, "-m", "gradhooks", "check", "cautious")


def test_it_streams(python: Path) -> None:
    program = """
import torch, gradhooks
scorer = gradhooks.MultiPose(torch.nn.Linear(3, 1), "cautious", accumulator="stream")
scorer(torch.randn(20, 3)).combined.sum().backward()
print(scorer.combination.__class__.__module__, scorer.report.accumulator, scorer.report.recomputed)
"""
    assert run(python, "-c", program).split() == ["acme_pooling.cautious", "stream", "0"]


def test_its_own_tests_pass(python: Path) -> None:
    source = python.parents[2] / "source"
    assert " passed" in run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", source)

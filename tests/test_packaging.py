"""The distributions: what the sdist and the wheel contain, and whether the wheel works with its dependencies alone."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling builds the distributions: pip install hatchling"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def contents(archive: Path) -> set[str]:
    """Return the files of a wheel or of an sdist, relative to its top."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


def source_files(folder: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder],  # noqa: S607 - git is wherever PATH says
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("needs a git checkout, which tells source files from others")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_wheel_contains_the_library_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    inside = contents(wheel)
    metadata = {name for name in inside if ".dist-info/" in name}
    assert inside - metadata == source_files("gradhooks")
    assert {name.split("/")[-1] for name in metadata} == {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt"}


def test_the_sdist_contains_what_git_does(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    folders = set().union(*(source_files(folder) for folder in ("gradhooks", "plugins", "tests", "examples")))
    files = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", ".gitignore", "PKG-INFO"}
    assert contents(sdist) == folders | files


def requirements_of(wheel: Path) -> list[str]:
    """Return the requirements in the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        return re.findall(r"^Requires-Dist: (.*)$", opened.read(metadata).decode(), re.MULTILINE)


def runtime_distributions(requirements: list[str]) -> set[str]:
    """Return the names of the distributions that the requirements need at run time, and those that they need."""
    found: set[str] = set()
    pending = list(requirements)
    while pending:
        requirement = Requirement(pending.pop())
        marker = requirement.marker
        if (marker is None or marker.evaluate({"extra": ""})) and requirement.name not in found:
            found.add(requirement.name)
            pending += distribution(requirement.name).requires or []
    return found


def link_distribution(name: str, site_packages: Path) -> None:
    """Make one installed distribution importable in another environment, as installing it there would."""
    for file in distribution(name).files or []:
        top = file.parts[0]
        source = Path(str(distribution(name).locate_file(top)))
        target = site_packages / top
        if top not in {"..", "__pycache__"} and source.exists() and not target.exists():
            target.symlink_to(source)


def test_the_wheel_runs_the_first_block_of_the_readme(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (wheel,) = built.glob("*.whl")
    for name in runtime_distributions(requirements_of(wheel)):
        link_distribution(name, site_packages)
    zipfile.ZipFile(wheel).extractall(site_packages)  # noqa: S202 - built above
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    script = block[1] + "\nimport gradhooks, importlib.util as u\nprint(gradhooks.__file__, u.find_spec('pytest'))"
    done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(site_packages) in done.stdout
    assert done.stdout.strip().endswith("None"), "the environment has more than the runtime dependencies"

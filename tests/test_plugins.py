"""Every installed combination and accumulator passes the kit, found through its entry point."""

import ast
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import gradhooks
import gradhooks.testing
from gradhooks import registry
from gradhooks.testing import parametrize_with_checks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

PLUGINS = Path(__file__).parent.parent / "plugins"
FOLDERS = sorted(path.parent for path in PLUGINS.glob("*/pyproject.toml"))


def names_in(folder: Path) -> list[str]:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return sorted(project["entry-points"]["gradhooks.combinations"])


def names_of(distribution: str) -> list[str]:
    points = entry_points(group="gradhooks.combinations")
    return sorted(point.name for point in points if point.dist is not None and point.dist.name == distribution)


FOUND = [name for folder in FOLDERS for name in names_in(folder) if name in registry.combinations.available()]
ALL_NAMES = [*names_of("gradhooks"), *FOUND]


def needs(folder: Path) -> None:
    missing = set(names_in(folder)) - set(FOUND)
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} not installed: pip install -e plugins/{folder.name}")


@parametrize_with_checks(ALL_NAMES)
def test_every_combination(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


@parametrize_with_checks([registry.accumulators.create(name) for name in ("auto", "recompute", "store", "stream")])
def test_every_accumulator(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_name_of_a_distribution_is_installed(folder: Path) -> None:
    needs(folder)
    for name in names_in(folder):
        assert registry.combinations.load(name).__name__


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_plugins_use_public_names_only(folder: Path) -> None:
    public = {"gradhooks": gradhooks.__all__, "gradhooks.testing": gradhooks.testing.__all__}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gradhooks":
                names = {alias.name for alias in node.names}
                assert names <= set(public[node.module or ""]), f"{path} imports {names} from {node.module}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_readme_runs(folder: Path) -> None:
    needs(folder)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL):
        exec(block, namespace)  # noqa: S102


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_readme_names_every_combination(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    assert [name for name in names_in(folder) if f"`{name}`" not in readme] == []

"""Every installed combination and accumulator passes the conformance kit, created through its entry point."""

import ast
import re
import sys
import types
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import gradhooks
import gradhooks.errors
import gradhooks.group_reductions
import gradhooks.testing
from gradhooks import registry
from gradhooks.testing import parametrize_with_checks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest on Python 3.10

PLUGINS = Path(__file__).parent.parent / "plugins"
FOLDERS = sorted(path.parent for path in PLUGINS.glob("*/pyproject.toml"))
PUBLIC = {
    "gradhooks": gradhooks.__all__,
    "gradhooks.errors": [name for name in vars(gradhooks.errors) if not name.startswith("_")],
    "gradhooks.group_reductions": gradhooks.group_reductions.__all__,
    "gradhooks.testing": gradhooks.testing.__all__,
}

every_distribution = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def names_in(folder: Path) -> list[str]:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return sorted(project["entry-points"]["gradhooks.combinations"])


def names_of(distribution: str) -> list[str]:
    points = entry_points(group="gradhooks.combinations")
    return sorted(point.name for point in points if point.dist is not None and point.dist.name == distribution)


INSTALLED = [name for folder in FOLDERS for name in names_in(folder) if name in registry.combinations.available()]


def require(folder: Path) -> None:
    missing = set(names_in(folder)) - set(INSTALLED)
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} not installed: pip install -e plugins/{folder.name}")


@parametrize_with_checks([*names_of("gradhooks"), *INSTALLED])
def test_combination(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


@parametrize_with_checks([registry.accumulators.create(name) for name in ("auto", "recompute", "store", "stream")])
def test_accumulator(plugin: Any, check: Callable[[Any], None]) -> None:
    check(plugin)


@every_distribution
def test_every_name_of_a_distribution_can_be_loaded(folder: Path) -> None:
    require(folder)
    for name in names_in(folder):
        assert registry.combinations.load(name).__name__


@every_distribution
def test_plugins_import_public_names_only(folder: Path) -> None:
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gradhooks":
                names = {alias.name for alias in node.names}
                assert names <= set(PUBLIC[node.module or ""]), f"{path} imports {names} from {node.module}"


@every_distribution
def test_readme_of_a_distribution(folder: Path) -> None:
    require(folder)
    readme = (folder / "README.md").read_text()
    assert [name for name in names_in(folder) if f"`{name}`" not in readme] == []
    run_python_blocks(readme, {})


def test_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (PLUGINS / "README.md").read_text()
    guide = types.ModuleType("guide")  # the checks pickle classes, which must be found in a module
    monkeypatch.setitem(sys.modules, "guide", guide)
    monkeypatch.setattr(registry.combinations, "_registered", {})  # removes what the guide registers
    run_python_blocks(readme, guide.__dict__)


def run_python_blocks(readme: str, namespace: dict[str, Any]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)  # noqa: S102

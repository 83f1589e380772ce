"""The house has floors: imports point down, files and functions are small, the public names are what they say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradhooks

PACKAGE = Path(gradhooks.__file__).parent

# From the ground up; a module may import from lower lines only. A folder is one floor, with an order of its own.
FLOORS = [
    ["errors", "dtypes"],
    ["combination"],
    ["distributed"],
    ["distributed.ranks"],
    ["distributed.share", "distributed.sharding"],
    ["distributed.refusals"],
    ["randomness", "report", "shadow", "trees", "progress", "modes", "reach", "checkpoints", "memory", "timing"],
    ["poses", "replay", "chunks"],
    ["group"],
    ["guard"],
    ["accumulators.base", "accumulators.declaration"],
    ["accumulators.sums", "accumulators.online", "accumulators.retained"],
    ["accumulators.again"],
    ["accumulators.unreached"],
    ["accumulators.recompute"],
    ["accumulators.sharded", "accumulators.store", "accumulators.stream"],
    ["accumulators.auto"],
    ["accumulators"],
    ["combinations.precision"],
    ["combinations.mean", "combinations.extremum", "combinations.boltzmann"],
    ["combinations"],
    ["registry"],
    ["bridge", "prediction", "passage", "inference"],
    ["multipose"],
    ["decorator"],
    ["conformance.failure", "conformance.oracle"],
    ["conformance.sample"],
    ["conformance.values", "conformance.derivatives"],
    ["conformance.training"],
    ["conformance.accumulators"],
    ["conformance.kit"],
    ["conformance"],
    ["testing", "measuring.table", "measuring.undisturbed", "measuring.rounds"],
    ["measuring.ways", "measuring.reference"],
    ["measuring.compare", "measuring.plan"],
    ["measuring.check", "measuring.bench"],
    ["measuring.beside"],
    ["measuring.promises", "measuring.sharing"],
    ["measuring"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports_of(source: str) -> set[str]:
    """The modules of gradhooks that a source names, without the package's own name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gradhooks":
            inside = node.module.removeprefix("gradhooks").removeprefix(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("gradhooks.") for alias in node.names if "gradhooks." in alias.name}
    return found


def upward_imports(name: str, source: str, floors: dict[str, int]) -> list[str]:
    return sorted(other for other in imports_of(source) if floors.get(other, -1) >= floors[name])


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if module_name(path) in FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    assert upward_imports(module_name(path), path.read_text(), FLOOR) == []


def test_every_module_that_others_build_on_has_a_floor() -> None:
    names = {module_name(path) for path in PACKAGE.rglob("*.py")}
    used = {other for path in MODULES for other in imports_of(path.read_text())}
    assert used <= set(FLOOR) | {""}
    assert set(FLOOR) <= names


def test_an_upward_import_would_be_found() -> None:
    floors = {"errors": 0, "group": 1}
    assert upward_imports("errors", "from gradhooks.engine.context import Group", floors) == ["group"]
    assert upward_imports("errors", "from gradhooks import group", floors) == ["group"]
    assert upward_imports("group", "from gradhooks.errors import GradhooksError", floors) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_files_and_functions_are_small(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= 40, f"{node.name} has {length} lines"


def test_all_is_sorted_and_complete() -> None:
    public = {name for name in vars(gradhooks) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(gradhooks, name)).__name__ == "module"}
    offered_modules = {"accumulators", "combinations", "registry"}
    assert gradhooks.__all__ == sorted(gradhooks.__all__)
    assert (
        set(gradhooks.__all__) == (public - modules - {"logger", "version", "PackageNotFoundError"}) | offered_modules
    )


def test_importing_gradhooks_imports_no_plugin_and_prints_nothing() -> None:
    script = (
        "import sys, gradhooks; print([name for name in ('rdkit', 'pytest', 'torch_geometric') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")

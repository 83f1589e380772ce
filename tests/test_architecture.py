"""The structure of the package: imports point one way, files and functions are small, public names are complete."""

import ast
import importlib
import pkgutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gradhooks

PACKAGE = Path(gradhooks.__file__).parent

# From the bottom up. A module imports only from lines above its own.
LAYERS = [
    ["errors", "numerics", "units", "random_state", "engine", "engine.nested"],
    ["group_index", "group_reductions"],
    ["combined"],
    ["group_validation", "group_loop", "padded_batch", "row_arguments"],
    ["groups"],
    ["collation"],
    ["combination", "combination_arguments"],
    ["distributed", "distributed.status", "distributed.lost_ranks", "distributed.checkpoint_names"],
    ["distributed.combination_description", "distributed.parameter_description"],
    ["distributed.collectives", "distributed.subject"],
    ["distributed.pose_parallel", "distributed.sharded_model"],
    ["distributed.agreement"],
    ["distributed.validation"],
    ["options"],
    ["engine.backward"],
    ["engine.model_output", "engine.autocast", "engine.training_flags", "engine.findings", "engine.hidden_generators"],
    [
        "engine.side_outputs",
        "engine.graph_leaves",
        "engine.saved_tensors",
        "engine.live_bytes",
        "engine.memory_budget",
        "engine.open_graphs",
    ],
    ["engine.learned", "engine.progress", "engine.report", "engine.gradient_sums"],
    [
        "engine.plain_objects",
        "engine.tensor_records",
        "engine.containers",
        "engine.script_attributes",
        "engine.generator_states",
    ],
    ["engine.tensor_watch", "engine.tensor_signs", "engine.container_watch", "engine.flat_sums"],
    ["engine.module_attributes", "engine.parameter_records"],
    ["engine.parameter_values"],
    ["engine.attribute_recorder", "engine.running_statistics"],
    ["engine.module_watch"],
    ["engine.module_values"],
    ["engine.loader_source", "engine.prepared_input", "engine.shared_memory"],
    ["engine.pose_inputs", "engine.pose_sources", "engine.model_state", "engine.memory_need"],
    [
        "engine.loaded_poses",
        "engine.parameter_hooks",
        "engine.parametrization_cache",
        "engine.tensor_names",
        "engine.pose_description",
    ],
    ["engine.pose_forms", "engine.running_sums"],
    ["engine.shadow_parameters", "engine.accumulation", "engine.schedule", "engine.graph_watch"],
    [
        "engine.leaves",
        "engine.model_parts",
        "engine.lazy_parameters",
        "engine.stack_promise",
        "engine.recovery",
        "engine.chunk_fitting",
    ],
    ["engine.pose_runner"],
    ["engine.batch"],
    ["engine.leaf_validation"],
    ["engine.chunk_dependence", "engine.context", "engine.plain"],
    ["engine.pose_reading"],
    ["engine.drift", "engine.batch_setup", "engine.grad_mode", "engine.leaf_versions", "engine.zero_gradients"],
    ["engine.audit", "engine.prediction_digest"],
    ["engine.rerun"],
    ["engine.unused_parameters"],
    ["engine.pose_engine"],
    ["engine.forward"],
    ["accumulators.base"],
    ["accumulators.online_softmax", "accumulators.declared_fit", "accumulators.declaration_warning"],
    ["accumulators.stream_chunks"],
    ["accumulators.host_memory", "accumulators.declared_weights"],
    ["accumulators.host_folding", "accumulators.device_folding"],
    ["accumulators.pose_shares"],
    ["accumulators.recompute"],
    ["accumulators.sharded_recompute", "accumulators.store", "accumulators.stream"],
    ["accumulators.auto"],
    ["accumulators"],
    ["combinations.pose_weights", "combinations.padded_groups", "combinations.pooling_module"],
    ["combinations.mean", "combinations.logsumexp", "combinations.boltzmann", "combinations.pooling_trial"],
    ["combinations.pooling"],
    ["combinations"],
    ["first_party"],
    ["entry_points"],
    ["plugin_options"],
    ["registry"],
    ["unused_parameter_search"],
    ["state_dict", "prediction", "autograd_function", "learned_attribute"],
    ["forward_pass"],
    ["wrapper"],
    ["decorator", "mypy_plugin"],
    ["testing.errors", "testing.reference"],
    ["testing.inputs"],
    ["testing.check_values", "testing.check_derivatives", "testing.check_groups"],
    ["testing.check_training"],
    ["testing.check_accumulators"],
    ["testing.runner"],
    ["testing"],
    ["profiling", "profiling.peak_memory", "profiling.preserved_state", "profiling.result_table"],
    ["profiling.timing", "profiling.gradient_error", "profiling.planned_engine", "profiling.model_contents"],
    ["profiling.checked_batch", "profiling.deep_copy", "profiling.outside_leaves", "profiling.gradient_observer"],
    ["profiling.training_batch", "profiling.batch_plan", "profiling.rounding", "profiling.content_differences"],
    ["profiling.training_steps", "profiling.batch_planner", "profiling.pose_memory", "profiling.independent_copy"],
    ["profiling.step_record", "profiling.check_result"],
    ["profiling.comparison", "profiling.pose_measurement", "profiling.trial"],
    ["profiling.memory_estimate", "profiling.full_graph_reference"],
    ["profiling.gradient_check"],
    ["plugin_check"],
    ["cli"],
    ["__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(source: str) -> set[str]:
    """Return the modules of gradhooks that a source imports, without the name of the package."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gradhooks":
            inside = node.module.removeprefix("gradhooks").removeprefix(".")
            imported |= {inside} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name.removeprefix("gradhooks.") for alias in node.names if "gradhooks." in alias.name}
    return imported


def upward_imports(name: str, source: str, layers: dict[str, int]) -> list[str]:
    return sorted(other for other in imports_of(source) if layers.get(other, -1) >= layers[name])


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_point_one_way() -> None:
    upward = {
        name: upward_imports(name, path.read_text(), LAYER) for path in FILES if (name := module_name(path)) in LAYER
    }
    assert {name: others for name, others in upward.items() if others} == {}


def test_every_module_has_a_layer() -> None:
    assert {module_name(path) for path in FILES} - {""} == set(LAYER)


def test_an_upward_import_is_found() -> None:
    layers = {"errors": 0, "wrapper": 1}
    assert upward_imports("errors", "from gradhooks.wrapper import MultiPose", layers) == ["wrapper"]
    assert upward_imports("errors", "from gradhooks import wrapper", layers) == ["wrapper"]
    assert upward_imports("wrapper", "from gradhooks.errors import GradhooksError", layers) == []


def test_accumulators_use_the_protocol_that_plugins_have() -> None:
    """Built-in accumulators see `Engine` only; the one for sharded parameters is not chosen by name."""
    allowed = {"accumulation", "findings", "gradient_sums", "parameter_hooks", "report", "running_sums"}
    for path in (PACKAGE / "accumulators").glob("*.py"):
        engine = {name.removeprefix("engine.") for name in imports_of(path.read_text()) if name.startswith("engine.")}
        assert path.name == "sharded_recompute.py" or engine <= allowed, path.name


def test_files_and_functions_are_small() -> None:
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 250} == {}
    assert statistics.median(lengths.values()) < 100
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                if length > 40:
                    long[f"{path.name}: {node.name}"] = length
    assert long == {}


def test_all_is_sorted_complete_and_what_dir_shows() -> None:
    assert gradhooks.__all__ == sorted(gradhooks.__all__)
    assert set(dir(gradhooks)) == {*gradhooks.__all__, "__version__"}
    public = {name for name, value in vars(gradhooks).items() if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(gradhooks, name), ModuleType)}
    offered_modules = {"accumulators", "combinations", "errors", "group_reductions", "registry", "testing"}
    imported = {"logger", "version", "PackageNotFoundError"}
    assert set(gradhooks.__all__) == (public - modules - imported) | offered_modules


def test_no_function_hides_a_module_of_its_name() -> None:
    for found in pkgutil.walk_packages(gradhooks.__path__, "gradhooks."):
        if found.name in {"gradhooks.__main__", "gradhooks.mypy_plugin"}:
            continue
        module = importlib.import_module(found.name)
        parent, _, name = found.name.rpartition(".")
        assert getattr(sys.modules[parent], name) is module, found.name


def test_every_public_function_and_method_is_annotated() -> None:
    missing = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                unnamed = [a.arg for a in arguments if a.annotation is None and a.arg not in {"self", "cls"}]
                if unnamed or node.returns is None:
                    missing.append(f"{path.name}: {node.name}")
    assert missing == []


def test_importing_gradhooks_imports_no_plugin_and_prints_nothing() -> None:
    script = (
        "import sys, gradhooks; print([name for name in ('rdkit', 'pytest', 'torch_geometric') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


OLD_FILES = [
    "passage",
    "inference",
    "bridge",
    "guard",
    "reach",
    "shadow",
    "chunks",
    "checkpoints",
    "trees",
    "modes",
    "randomness",
    "replay",
    "dtypes",
    "timing",
    "multipose",
    "again",
    "unreached",
    "retained",
    "sums",
    "online",
    "declaration",
    "sharded",
    "extremum",
    "precision",
    "ranks",
    "share",
    "sharding",
    "refusals",
    "kit",
    "oracle",
    "sample",
    "failure",
    "plan",
    "ways",
    "rounds",
    "undisturbed",
    "beside",
    "promises",
    "bench",
    "sharing",
    "witness",
    "zoo",
]


@pytest.mark.parametrize("folder", ["gradhooks", "tests", "examples", "plugins"])
def test_no_old_file_name_is_left(folder: str) -> None:
    root = PACKAGE.parent / folder
    kept = {"profiling/timing.py"}
    names = {path.relative_to(root).as_posix(): path.stem for path in root.rglob("*.py") if ".venv" not in path.parts}
    assert [path for path, stem in names.items() if stem in OLD_FILES and path not in kept] == []

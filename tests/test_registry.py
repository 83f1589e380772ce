"""Names of plugins: loaded on first use; clashes and broken plugins are reported and affect no other name."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger

import gradhooks
from gradhooks import entry_points
from gradhooks.errors import GradhooksWarning, PluginError
from gradhooks.first_party import BUILT_IN, FIRST_PARTY
from gradhooks.registry import combinations

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest on that version

HEALTHY = """
from gradhooks import Combination

class Total(Combination):
    def forward(self, predictions):
        return predictions.sum(0)
"""

NEEDS_OPTIONS = """
from gradhooks import Combination

class Total(Combination):
    def __init__(self, width, *, depth, height=2, **others):
        super().__init__()

    def forward(self, predictions):
        return predictions.sum(0)
"""

Install = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of distributions, first on `sys.path`."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Install:
    def make(distribution: str, points: str, source: str = HEALTHY, version: str = "1.0") -> None:
        """Write the files that pip writes for a distribution with one module of the same name."""
        metadata = site / f"{distribution}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text(f"[gradhooks.combinations]\n{points}\n")
        (site / f"{distribution}.py").write_text(source)

    return make


def test_listing_imports_nothing(install: Install) -> None:
    install("quiet", "quiet_total = quiet:Total", "raise RuntimeError('imported')")
    assert "quiet_total" in combinations.available()
    assert "quiet" not in sys.modules


def test_a_plugin_is_found_by_name(install: Install) -> None:
    install("totals", "total = totals:Total")
    assert type(combinations.create("total")).__name__ == "Total"
    assert type(combinations.create("totals:total")).__name__ == "Total"


def test_a_clash_names_both_distributions_and_each_can_be_loaded(install: Install) -> None:
    install("first_totals", "total = first_totals:Total")
    install("second_totals", "total = second_totals:Total", version="2.1")
    with pytest.raises(PluginError, match=r"first_totals 1\.0 and second_totals 2\.1|second_totals 2\.1 and first_tot"):
        combinations.load("total")
    assert combinations.load("second-totals:total").__module__ == "second_totals"
    assert {"first_totals:total", "second_totals:total"} <= set(combinations.available())


@pytest.mark.parametrize(
    ("points", "source", "message"),
    [
        ("bad = bad:Total", "import nonesuch", r"'bad' of bad 1\.0 .* ModuleNotFoundError: No module named 'nonesuch'"),
        ("bad = bad:Totals", HEALTHY, r"bad 1\.0 .* AttributeError: .*Totals.* Repair or uninstall"),
        ("bad = bad:Total", HEALTHY + "    api_version = 99", r"bad 1\.0 was written for version 99 .* has version 1"),
        ("bad = bad:Total", "class Total: pass", r"bad 1\.0 is <class 'bad\.Total'>; .* must name a subclass"),
        ("bad = bad:Total", "Total = 3", r"bad 1\.0 is 3; .* must name a subclass"),
        ("bad = bad", HEALTHY, r"bad 1\.0 is <module .*must name a subclass"),
        ("bad = bad:Total", "raise SystemExit(3)", r"bad 1\.0 cannot be imported from 'bad:Total': SystemExit: 3"),
        ("bad =", HEALTHY, r"bad 1\.0 .*cannot be imported from ''"),
        ("bad = bad Total", HEALTHY, r"bad 1\.0 .*cannot be imported from 'bad Total'"),
    ],
    ids=[
        "import fails",
        "no such class",
        "future API",
        "no Combination",
        "number",
        "module",
        "exits",
        "no value",
        "no colon",
    ],
)
def test_a_broken_plugin_says_what_is_wrong(install: Install, points: str, source: str, message: str) -> None:
    install("bad", points, source)
    with pytest.raises(PluginError, match=message):
        combinations.load("bad")
    assert "bad" in combinations.available()
    assert isinstance(combinations.create("mean"), gradhooks.combinations.Mean)


def test_unreadable_metadata_affects_no_other_distribution(install: Install) -> None:
    install("unreadable", "a line that is no entry point")
    install("totals", "total = totals:Total")
    with pytest.warns(GradhooksWarning, match=r"entry_points.txt of unreadable 1\.0 cannot be read"):
        assert {"mean", "total"} <= set(combinations.available())


def test_a_repaired_plugin_is_loaded(install: Install, site: Path) -> None:
    install("repaired", "repaired = repaired:Total", "raise OSError('no network')")
    with pytest.raises(PluginError, match="OSError: no network"):
        combinations.load("repaired")
    (site / "repaired.py").write_text(HEALTHY + "\n# another size, so that no cached bytecode is used\n")
    assert combinations.load("repaired").__name__ == "Total"


def test_plugins_can_be_disabled(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("totals", "total = totals:Total")
    monkeypatch.setenv("GRADHOOKS_DISABLE_PLUGINS", "1")
    assert combinations.available() == ["boltzmann", "max", "mean", "min"]
    with pytest.raises(PluginError, match="unknown combination 'total'"):
        combinations.load("total")


def test_an_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(PluginError, match="did you mean 'boltzmann'"):
        combinations.load("bolzmann")


def test_an_unknown_name_lists_what_is_available() -> None:
    with pytest.raises(PluginError, match=r"unknown combination 'qqq'\. Available: .*boltzmann.*, max, mean, "):
        combinations.load("qqq")


@pytest.mark.parametrize("name", ["noisy_or", "gradhooks-mil:noisy_or", "gradhooks_mil:noisy_or"])
def test_a_plugin_that_is_not_installed_says_which_distribution_has_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _hide(monkeypatch, "gradhooks-mil")
    with pytest.raises(
        PluginError,
        match=f"'{name}' is provided by gradhooks-mil, which is not installed: pip install gradhooks-mil",
    ):
        combinations.load(name)
    with pytest.raises(PluginError, match="unknown combination 'other:noisy_or'"):
        combinations.load("other:noisy_or")


def test_a_plugin_of_a_newer_version_says_to_upgrade(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "gradhooks-robust")
    install("gradhooks_robust", "older = gradhooks_robust:Total", version="0.0.9")
    with pytest.raises(PluginError, match=r"newer versions of gradhooks-robust than 0\.0\.9: pip install --upgrade"):
        combinations.load("median_gradient")


def _hide(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    """Make an installed distribution look as if it were not installed."""
    find = metadata.Distribution.discover

    def discover(**options: Any) -> Iterator[metadata.Distribution]:
        return (each for each in find(**options) if each.metadata["Name"] != distribution)

    monkeypatch.setattr(metadata.Distribution, "discover", staticmethod(discover))
    monkeypatch.setattr(entry_points, "_metadata", entry_points._Metadata())


def test_disabled_plugins_are_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHOOKS_DISABLE_PLUGINS", "1")
    with pytest.raises(PluginError, match=r"unknown combination 'noisy_or'.*GRADHOOKS_DISABLE_PLUGINS hides"):
        combinations.load("noisy_or")


def test_the_table_of_first_party_names_agrees_with_the_plugins() -> None:
    tables = {}
    for path in Path(__file__).parents[1].glob("plugins/gradhooks-*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        assert set(project["entry-points"]) == {"gradhooks.combinations"}
        tables[project["name"]] = sorted(project["entry-points"]["gradhooks.combinations"])
    assert {distribution: sorted(names) for distribution, names in FIRST_PARTY.items()} == tables


def test_the_table_of_built_in_names_agrees_with_the_metadata() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {group: dict(points) for group, points in BUILT_IN.items()} == project["entry-points"]


def test_required_options_are_named(install: Install) -> None:
    install("optional", "optional = optional:Total", NEEDS_OPTIONS)
    with pytest.raises(
        PluginError,
        match=r"^combination 'optional' of optional [\d.]+ needs options: width, depth\. It takes "
        r"width, depth, height=2, any other option\. Pass combination_options=\{'width': \.\.\., 'depth': \.\.\.\}, "
        r"or an object: from optional import Total; "
        r"MultiPose\(model, Total\(width=\.\.\., depth=\.\.\.\)\)$",
    ):
        gradhooks.MultiPose(torch.nn.Linear(1, 1), "optional")
    with pytest.raises(PluginError, match=r"needs options: depth\."):
        combinations.create("optional", width=1)
    assert type(combinations.create("optional", width=1, depth=2)).__name__ == "Total"


def test_loading_a_plugin_is_logged_once(install: Install) -> None:
    install("logged", "logged = logged:Total", version="1.2")
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="DEBUG")
    logger.enable("gradhooks")
    try:
        combinations.create("logged")
        combinations.create("logged")
    finally:
        logger.disable("gradhooks")
        logger.remove(sink)
    assert messages == ["loaded combination 'logged' of logged 1.2"]


def test_registering_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combinations, "_registered", {})
    combinations.register("mine")(gradhooks.combinations.Mean)
    assert "mine" in combinations.available()
    assert isinstance(combinations.create("mine"), gradhooks.combinations.Mean)
    with pytest.raises(PluginError, match="'mean' is already provided by gradhooks"):
        combinations.register("mean")(gradhooks.combinations.Mean)


def test_options_by_name() -> None:
    model, options = torch.nn.Linear(2, 3), {"scale": 5.0, "normalize": True}
    for scorer in (
        gradhooks.MultiPose(model, "max", combination_options=options),
        gradhooks.multipose("max", combination_options=options)(model),
    ):
        assert (scorer.combination.scale, scorer.combination.normalize) == (5.0, True)
        scorer.combination = "max"
        assert scorer.combination.scale == 1000

    @gradhooks.multipose("max", combination_options=options)
    class Model(torch.nn.Linear):
        pass

    assert Model(2, 3).combination.scale == 5
    assert Model(2, 3).combination is not Model(2, 3).combination


def test_options_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(combination: object, **options: object) -> None:
        gradhooks.MultiPose(torch.nn.Linear(1, 1), combination, combination_options=options)  # type: ignore[arg-type]

    with pytest.raises(
        PluginError,
        match=r"^combination 'max' of gradhooks [\d.]+ has no option 'sclae'; did you mean 'scale'\? It takes "
        r"scale=1000\.0, normalize=False$",
    ):
        create("max", sclae=3)
    with pytest.raises(PluginError, match=r"'mean' of gradhooks [\d.]+ has no option 'scale'\. It takes no options$"):
        create("mean", scale=3)
    with pytest.raises(
        PluginError, match=r"'max' of .* cannot be created with options .*'<' not supp.* It takes scale=1000"
    ):
        create("max", scale="wide")
    with pytest.raises(gradhooks.errors.CombinationError, match="scale must be positive and finite, got -1"):
        create("max", scale=-1)
    with pytest.raises(TypeError, match=r"options are for a combination that is given by its name; pass scale to the"):
        create(gradhooks.combinations.Max(), scale=3)
    with pytest.raises(TypeError, match=r"combination must be a name or an object .*, got None"):
        create(None, scale=3)
    with pytest.raises(TypeError, match="no option 'combination_option'; did you mean 'combination_options'"):
        gradhooks.multipose("max", combination_option={})  # type: ignore[call-arg]

    def forwards(**options: Any) -> gradhooks.combinations.Max:
        return gradhooks.combinations.Max(**options)

    monkeypatch.setattr(combinations, "_registered", {"any": forwards})
    create("any", scale=3)
    with pytest.raises(PluginError, match=r"'any' registered in this process cannot be .* It takes any other option$"):
        create("any", scal=3)
    with pytest.raises(PluginError, match=r"'recompute' of gradhooks [\d.]+ has no option 'retain'"):
        gradhooks.registry.accumulators.create("recompute", retain="1GiB")


def test_broken_plugins_affect_neither_the_others_nor_the_listing(install: Install, site: Path) -> None:
    install("first_totals", "total = first_totals:Total")
    install("second_totals", "total = second_totals:Total")
    install("raising", "raising = raising:Total", "raise ImportError('no libfoo')")
    install("future", "future = future:Total", HEALTHY + "    api_version = 99")
    install("unrelated", "unrelated = unrelated:Total", "class Total: pass")
    install("exiting", "exiting = exiting:Total", "import sys\nsys.exit('no licence')")
    install("optional", "optional = optional:Total", NEEDS_OPTIONS)
    install("example", "example = example:Total", NEEDS_OPTIONS + "    example_options = {'width': 1, 'depth': 2}")
    install("malformed", "malformed =")
    install("ending", "ending = ending:Total", "import os\nos._exit(7)")
    install("hanging", "hanging = hanging:Total", "import time\ntime.sleep(600)")
    install("printing", "printing = printing:Total", "print('a line that is not of the table')\n" + HEALTHY)
    install("fine", "fine = fine:Total")

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    use = "import gradhooks.cli\nfor name in ['mean', 'min', 'max', 'boltzmann', 'fine', 'first_totals:total']:\n"
    use += "    gradhooks.registry.combinations.create(name)\n"
    lines = python("-c", use + "gradhooks.cli.main(['plugins'])").splitlines()
    names = ["first_totals:total", "second_totals:total", "raising", "future", "unrelated", "exiting", "malformed"]
    names += ["ending", "hanging"]
    for name in [*names, "optional", "fine"]:
        (line,) = [line for line in lines if line.split()[0] == name]
        assert "not loaded" in line
    lines = python("-m", "gradhooks", "plugins", "--check", "--timeout", "2").splitlines()
    assert not any("not of the table" in line for line in lines)
    expected = {
        "ending": r"\? +it ended the process, exit code 7$",
        "hanging": r"\? +it had not finished after 2 s$",
        "printing": "no +ok$",
        "first_totals:total": "no +ok; 'total' is also provided by second_totals",
        "second_totals:total": "no +ok; 'total' is also provided by first_totals",
        "exiting": "SystemExit: no licence",
        "optional": r"\? +needs options: width, depth$",
        "example": r"no +needs options: width, depth$",
        "raising": "ImportError: no libfoo",
        "future": "was written for version 99",
        "unrelated": "must name a subclass of gradhooks' Combination",
        "malformed": "cannot be imported from ''",
        "fine": r"1\.0 +no +ok$",
        "mean": "yes +ok$",
    }
    for name, state in expected.items():
        (line,) = [line for line in lines if line.split()[0] == name]
        assert re.search(state, line), line


def test_a_built_in_is_not_shadowed(install: Install) -> None:
    install("shadowing", "mean = shadowing:Total")
    assert combinations.load("mean") is gradhooks.combinations.Mean
    assert combinations.load("shadowing:mean").__module__ == "shadowing"
    assert {"mean", "shadowing:mean"} <= set(combinations.available())
    assert "gradhooks:mean" not in combinations.available()


def test_another_distribution_named_gradhooks_displaces_nothing(install: Install) -> None:
    install("gradhooks", "mean = gradhooks_other:Total\nstray = gradhooks_other:Total", version="99.0")
    for name in ("mean", "gradhooks:mean"):
        assert combinations.load(name) is gradhooks.combinations.Mean
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert {"mean", "min", "max", "boltzmann"} <= set(combinations.available())
        with pytest.raises(PluginError, match="unknown combination 'stray'"):
            combinations.load("stray")
    assert any("calls itself gradhooks 99.0 provides 'stray' from 'gradhooks_o" in str(each.message) for each in caught)


def test_five_hundred_plugins(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(500):
        install(f"many{number}", f"total{number} = many{number}:Total")
    reads: list[str] = []
    read = entry_points._entry_points
    monkeypatch.setattr(entry_points, "_entry_points", lambda group: (reads.append(group), read(group))[1])
    assert len(combinations.available()) >= 504
    for _ in range(5):
        assert type(combinations.create("total7")).__name__ == "Total"
    assert reads == [combinations.group]
    install("late", "late_total = late:Total")
    assert type(combinations.create("late_total")).__name__ == "Total"
    with pytest.raises(PluginError, match="did you mean 'total499'"):
        combinations.create("totals499")


def test_an_error_without_a_message(install: Install) -> None:
    source = "class Unprintable(Exception):\n    def __str__(self):\n        raise ValueError\nraise Unprintable"
    install("unprintable", "unprintable = unprintable:Total", source)
    with pytest.raises(PluginError, match=r"cannot be imported from 'unprintable:Total': Unprintable\. Repair"):
        combinations.load("unprintable")

"""Names of plugins: found lazily, clashes and broken ones told apart, nobody broken by a stranger."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gradhooks
from gradhooks.errors import GradhooksWarning, PluginError
from gradhooks.registry import combinations

HEALTHY = """
from gradhooks import Combination

class Total(Combination):
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
        """What pip leaves of a distribution with one module, named like it."""
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


def test_a_clash_names_both_and_each_can_be_had(install: Install) -> None:
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
        ("bad = bad:Totals", HEALTHY, r"bad 1\.0 .* AttributeError: .*Totals.* Mend or uninstall"),
        ("bad = bad:Total", HEALTHY + "    api_version = 99", r"bad 1\.0 was written for version 99 .* has version 1"),
        ("bad = bad:Total", "class Total: pass", r"bad 1\.0 is <class 'bad\.Total'>; .* must name a subclass"),
        ("bad = bad:Total", "Total = 3", r"bad 1\.0 is 3; .* must name a subclass"),
        ("bad = bad", HEALTHY, r"bad 1\.0 is <module .*must name a subclass"),
        ("bad =", HEALTHY, r"bad 1\.0 .*cannot be imported from ''"),
        ("bad = bad Total", HEALTHY, r"bad 1\.0 .*cannot be imported from 'bad Total'"),
    ],
    ids=["import fails", "no such class", "future API", "no Combination", "number", "module", "no value", "no colon"],
)
def test_a_broken_plugin_says_what_is_wrong(install: Install, points: str, source: str, message: str) -> None:
    install("bad", points, source)
    with pytest.raises(PluginError, match=message):
        combinations.load("bad")
    assert "bad" in combinations.available()
    assert isinstance(combinations.create("mean"), gradhooks.combinations.Mean)


def test_unreadable_metadata_spoils_nothing_else(install: Install) -> None:
    install("unreadable", "a line that is no entry point")
    install("totals", "total = totals:Total")
    with pytest.warns(GradhooksWarning, match=r"entry_points.txt of unreadable 1\.0 cannot be read"):
        assert {"mean", "total"} <= set(combinations.available())


def test_a_mended_plugin_is_loaded(install: Install, site: Path) -> None:
    install("mended", "mended = mended:Total", "raise OSError('no network')")
    with pytest.raises(PluginError, match="OSError: no network"):
        combinations.load("mended")
    (site / "mended.py").write_text(HEALTHY + "\n# another size, so that no cached bytecode is taken\n")
    assert combinations.load("mended").__name__ == "Total"


def test_plugins_can_be_disabled(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("totals", "total = totals:Total")
    monkeypatch.setenv("GRADHOOKS_DISABLE_PLUGINS", "1")
    assert combinations.available() == ["boltzmann", "max", "mean", "min"]
    with pytest.raises(PluginError, match="unknown combination 'total'"):
        combinations.load("total")


def test_an_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(PluginError, match="did you mean 'boltzmann'"):
        combinations.load("bolzmann")


def test_registering_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combinations, "_registered", {})
    combinations.register("mine")(gradhooks.combinations.Mean)
    assert "mine" in combinations.available()
    assert isinstance(combinations.create("mine"), gradhooks.combinations.Mean)
    with pytest.raises(PluginError, match="'mean' is already provided by gradhooks"):
        combinations.register("mean")(gradhooks.combinations.Mean)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(PluginError, match=r"'mean' cannot be made with options \{'scale': 3\}"):
        combinations.create("mean", scale=3)


def test_all_at_once(install: Install, site: Path) -> None:
    install("first_totals", "total = first_totals:Total")
    install("second_totals", "total = second_totals:Total")
    install("raising", "raising = raising:Total", "raise ImportError('no libfoo')")
    install("future", "future = future:Total", HEALTHY + "    api_version = 99")
    install("stranger", "stranger = stranger:Total", "class Total: pass")
    install("malformed", "malformed =")
    install("fine", "fine = fine:Total")

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    use = "import gradhooks\nfor name in ['mean', 'min', 'max', 'boltzmann', 'fine', 'first_totals:total']:\n"
    python("-c", use + "    gradhooks.registry.combinations.create(name)")
    lines = python("-m", "gradhooks", "plugins").splitlines()
    expected = {
        "first_totals:total": "'total' is also claimed by second_totals",
        "second_totals:total": "'total' is also claimed by first_totals",
        "raising": "ImportError: no libfoo",
        "future": "was written for version 99",
        "stranger": "must name a subclass of gradhooks' Combination",
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

"""Types as a user sees them, by mypy --strict and by pyright."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

USER_FILE = """
import torch
from torch import Tensor, nn

import gradhooks


class Network(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, 1)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.linear(pose)
        return prediction


@gradhooks.multipose("min", combination_options={"scale": 3.0}, chunk_size=2)
class Decorated(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.linear(pose)
        return prediction


scorer = gradhooks.MultiPose(Network(), "min", chunk_size=2, memory="1GiB", generators=[torch.Generator()])
reveal_type(scorer)  # R1
reveal_type(scorer.model.width)  # R2
reveal_type(scorer(torch.zeros(3, 4)).combined)  # R3
combined, per_pose = scorer([torch.zeros(4)], weights=torch.ones(1))
reveal_type(per_pose)  # R4
reveal_type(scorer.report)  # R5
reveal_type(scorer.report.reason)  # R6
reveal_type(scorer.tolerance)  # R7
scorer.tolerance = 0.5
scorer.accumulator = "stream"
optimizer = torch.optim.Adam(scorer.parameters())
pooling = gradhooks.combinations.Pooling(nn.Identity(), return_att=True)
pooled = gradhooks.MultiPose(Network(), pooling)(torch.zeros(3, 4))
reveal_type(pooled.attention)  # R12
decorated = Decorated(width=3)
reveal_type(decorated.report)  # R8
reveal_type(decorated(torch.zeros(3, 3)).combined)  # R9
reveal_type(gradhooks.multipose("mean")(Network()))  # R10


def takes_decorated(model: Decorated) -> None:
    reveal_type(model.report)  # R11


scorer.reprot  # E1
scorer.report.skiped  # E2
gradhooks.MultiPose(Network(), chunk_sise=2)  # E3
gradhooks.MultiPose(Network(), nonfinite="ignore")  # E4
scorer.tolerance = "small"  # E5
Decorated(widht=3)  # E6


@gradhooks.multipose("min", chunk_sise=2)  # E7
class Misspelt(nn.Module):
    pass


scorer([torch.zeros(4)]).poses  # E8
gradhooks.MultiPose(Network(), "min", combination_options=["scale"])  # E9
scorer(torch.zeros(3, 4)).attention.atention  # E10
"""
REVEALED = {
    "R1": "MultiPose[Network]",
    "R2": "int",
    "R3": "Tensor",
    "R4": "Tensor",
    "R5": "Report",
    "R6": "str",
    "R7": "float | None",
    "R8": "Report",
    "R9": "Tensor",
    "R10": "MultiPose[Network]",
    "R11": "Report",
    "R12": "Tensor",
}
ERRORS = {f"E{number}" for number in range(1, 11)}
MARKED = {
    number: found[1]
    for number, line in enumerate(USER_FILE.splitlines(), 1)
    if (found := re.search(r"# ([ER]\d+)$", line))
}

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mypy", "basedpyright")),
    reason="needs mypy and basedpyright: pip install mypy basedpyright",
)


def test_mypy(tmp_path: Path) -> None:
    # With the options and the cache of the project, so that torch is not read anew.
    config = "[mypy]\nstrict = true\ndisallow_untyped_calls = false\nplugins = gradhooks.mypy_plugin\n"
    (tmp_path / "mypy.ini").write_text(config)
    cache = Path(__file__).parents[1] / ".mypy_cache"
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(cache), "user.py"]
    for text in (USER_FILE, f"{USER_FILE}\nedited = True\n"):  # the second reads gradhooks from the cache
        (tmp_path / "user.py").write_text(text)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        found = re.findall(r"^user\.py:(\d+): (error|note): (.*)$", done.stdout, re.MULTILINE)
        revealed = {MARKED[int(line)]: text for line, kind, text in found if "Revealed type" in text}
        types = {mark: text.split('"')[1].replace("torch._tensor.", "") for mark, text in revealed.items()}
        assert {mark: re.sub(r"\b\w+\.", "", name) for mark, name in types.items()} == REVEALED
        errors = {MARKED.get(int(line), f"line {line}: {text}") for line, kind, text in found if kind == "error"}
        assert errors == ERRORS


def test_pyright(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_FILE)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard"}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = [
        (entry["range"]["start"]["line"] + 1, entry["severity"], entry["message"])
        for entry in json.loads(done.stdout)["generalDiagnostics"]
    ]
    revealed = {MARKED[line]: text.split('"')[-2] for line, severity, text in found if severity == "information"}
    assert revealed == REVEALED
    assert {MARKED.get(line, f"line {line}: {text}") for line, severity, text in found if severity == "error"} == ERRORS

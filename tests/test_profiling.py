"""compare, plan and check tell the truth about small models, and leave them as they were."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.targets import Promise, as_table
from torch import Tensor, nn

import gradhooks
from gradhooks.cli import main
from gradhooks.profiling.peak_memory import PeakMemory


class Wide(nn.Module):
    """Its graph outweighs its parameters, as graphs do where gradhooks is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, pose: Tensor) -> Tensor:
        return self.inner(self.norm(pose)).mean(0)


def random_poses(count: int) -> list[Tensor]:
    return [torch.randn(256, 16) for _ in range(count)]


@pytest.mark.parametrize("combination", ["mean", "boltzmann"])
def test_compare(combination: str, tmp_path: Path) -> None:
    model, poses = Wide(), random_poses(6)
    for leaf in model.parameters():
        leaf.grad = torch.ones_like(leaf)
    before = torch.get_rng_state()
    found = gradhooks.compare(
        model, poses, combination, accumulators=["store", "stream", "recompute", "auto"], repeats=1
    )
    assert [row.way.split(" (")[0] for row in found.rows[2:]] == ["store", "stream", "recompute", "auto"]
    assert found.rows[0].time_ratio == 1
    assert all(row.error < 1e-5 for row in found.rows)
    assert found.rows[3].peak_bytes < 0.5 * found.rows[0].peak_bytes
    assert all(leaf.grad is not None and (leaf.grad == 1).all() for leaf in model.parameters())
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(before, torch.get_rng_state())
    assert "checkpoint per pose" in str(found)
    found.save(tmp_path / "comparison.json")
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["way"] == "full graph"
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 1000


@pytest.mark.parametrize("combination", ["mean", "min", "boltzmann"])
@pytest.mark.parametrize("accumulator", ["store", "stream", "recompute"])
@pytest.mark.parametrize("count", [4, 16])
def test_plan_predicts_the_peak_within_ten_percent(combination: str, accumulator: str, count: int) -> None:
    model, poses = Wide(), random_poses(count)
    predicted = gradhooks.estimate_memory(model, poses[:2], combination, count=count)
    combiner = gradhooks.registry.combinations.create(combination)
    scorer = gradhooks.MultiPose(model, combiner, accumulator=accumulator, tolerance=0)
    with PeakMemory() as memory:
        scorer(poses).combined.sum().backward()
    assert predicted.peaks[accumulator] == pytest.approx(memory.peak, rel=0.1)
    assert predicted.fits(accumulator)
    assert accumulator in str(predicted)
    assert all(leaf.grad is not None for leaf in model.parameters())


def test_check_passes_a_good_model_and_names_unreached_parameters() -> None:
    model = Wide()
    model.unused = nn.Linear(2, 2)
    proof = gradhooks.gradcheck(model, random_poses(3), "boltzmann")
    assert proof.passed
    assert proof.unreached == ("unused.weight", "unused.bias")
    assert "no pose reaches unused.weight" in str(proof)
    assert all(leaf.dtype == torch.float32 and leaf.grad is None for leaf in model.parameters())


class Drifting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(16, 1), 0

    def forward(self, pose: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(pose * self.calls).mean(0)


def test_check_fails_a_model_that_cannot_be_repeated() -> None:
    proof = gradhooks.gradcheck(Drifting(), random_poses(3), "boltzmann")
    assert not proof.passed
    assert not proof.replays
    assert "ANOTHER prediction" in str(proof)


def test_bench_prints_the_table_of_the_readme(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    status = main(["bench", "resnet", "--poses", "2", "--repeats", "1", "--save", str(tmp_path / "figures.json")])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert status == 0
    assert "| time / peak memory, full graph = 1" in printed
    assert "min, scale 1000: recompute" in printed
    assert len(json.loads((tmp_path / "figures.json").read_text())) == 3
    assert main(["bench", "nonsense"]) == 2
    assert "unknown model nonsense: available are schnet, transformer, resnet" in capsys.readouterr().out


def test_bench_measures_what_is_promised(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads, path = torch.get_num_threads(), tmp_path / "promises.json"
    status = main(
        ["bench", "resnet", "--promises", "--poses", "2", "--many", "16", "--repeats", "1", "--save", str(path)]
    )
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert status == 0
    saved = json.loads(path.read_text())
    assert len(saved) == printed.count("\n") - 2 == 27
    # Bytes are counted, and the same in every run.
    peaks = [promise for promise in saved if ", peak" in promise["promise"]]
    assert len(peaks) == 8
    assert all(promise["met"] for promise in peaks), peaks
    assert all(promise["measured"] > 0 for promise in saved)


def test_a_promise_that_is_broken_shows() -> None:
    kept = [Promise("a", "one", 1.2, 1.0), Promise("b", "one", 0.9, 1.0), Promise("b", "other", 2.0, 2.0)]
    lines = [line.split("|")[1:-1] for line in as_table(kept).splitlines()]
    assert [[cell.strip() for cell in line] for line in lines[2:]] == [
        ["one", "1.00", "1.200 NOT MET", "0.900"],
        ["other", "2.00", "", "2.000"],
    ]

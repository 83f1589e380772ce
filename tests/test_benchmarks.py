"""The scripts in examples/benchmarks run, and print and save what they measure."""

import json
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def _sibling_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the folder of the scripts on `sys.path`, as Python does for a script."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def run_script(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    """Run a script in this process, because torch is already imported here."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("_sibling_imports")
def test_report_prints_the_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    run_script(monkeypatch, "report.py", "resnet", "--poses", "2", "--repeats", "1", "--save", str(path))
    printed = capsys.readouterr().out
    assert "| time / peak memory, full graph = 1" in printed
    assert "| mean: auto, memory=64GiB " in printed
    assert "| min, scale 1000: recompute " in printed
    assert len(json.loads(path.read_text())) == 3
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "report.py", "nonsense")
    assert "unknown model nonsense; available: schnet, transformer, resnet" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.usefixtures("_sibling_imports")
def test_targets_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "targets.json"
    sizes = ["--poses", "2", "--long-group", "12", "--repeats", "1"]
    run_script(monkeypatch, "targets.py", "resnet", *sizes, "--save", str(path))
    printed = capsys.readouterr().out
    saved = json.loads(path.read_text())
    assert len(saved) == printed.count("\n") - 2 == 27
    # Bytes are counted, so they are the same in every run.
    peaks = [target for target in saved if ", peak" in target["quantity"]]
    assert len(peaks) == 8
    assert all(target["met"] for target in peaks), peaks
    assert all(target["measured"] > 0 for target in saved)


@pytest.mark.usefixtures("_sibling_imports")
def test_a_target_that_is_not_met_is_marked() -> None:
    from targets import Target, target_table  # noqa: PLC0415 - on sys.path in this test only

    targets = [Target("a", "one", 1.2, 1.0), Target("b", "one", 0.9, 1.0), Target("b", "other", 2.0, 2.0)]
    lines = [line.split("|")[1:-1] for line in target_table(targets).splitlines()]
    assert [[cell.strip() for cell in line] for line in lines[2:]] == [
        ["one", "1.00", "1.200 NOT MET", "0.900"],
        ["other", "2.00", "", "2.000"],
    ]


@pytest.mark.usefixtures("_sibling_imports")
def test_batches_are_compared_with_the_batched_full_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "batches.json"
    sizes = ["--models", "mlp", "--sizes", "4", "--groups", "1", "2", "--repeats", "1"]
    run_script(monkeypatch, "batches.py", *sizes, "--save", str(path))
    printed = capsys.readouterr().out
    assert printed.count("| mlp: boltzmann ") == 2
    saved = json.loads(path.read_text())
    assert [time["way"] for time in saved].count("a tenth") == 2
    assert len(saved) == 20
    assert all(time["ratio"] > 0 for time in saved)


@pytest.mark.usefixtures("_sibling_imports")
def test_batches_above_their_limit_are_bold() -> None:
    from batches import BatchTime, table  # noqa: PLC0415 - on sys.path in this test only

    times = [
        BatchTime("schnet", "mean", 4, 8, "default", 0.1, 1.2),
        BatchTime("schnet", "mean", 4, 8, "memory=0", 0.1, 1.3),
        BatchTime("mlp", "mean", 4, 8, "default", 1e-4, 3.0),  # less than a millisecond more
        BatchTime("mlp", "mean", 4, 64, "default", 1e-2, 3.0),
    ]
    cells = [[cell.strip() for cell in line.split("|")[4:-1]] for line in table(times).splitlines()[2:]]
    assert [row[:2] for row in cells] == [["100 ms", "**1.20**"], ["100 us", "3.00"], ["10.0 ms", "**3.00**"]]
    assert cells[0][2] == "1.30"


@pytest.mark.long
@pytest.mark.usefixtures("_sibling_imports")
def test_the_curve_of_memory_stays_below_its_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "curve.json"
    sizes = ["--model", "mlp", "--group-size", "16", "--groups", "32", "--many", "16", "--repeats", "1"]
    run_script(monkeypatch, "memory_curve.py", *sizes, "--save", str(path))
    assert "| mean: 0 B " in capsys.readouterr().out
    saved = json.loads(path.read_text())
    points = [point for point in saved if "bound" in point]
    assert len(points) == 18
    assert points[5]["plain"] == 512
    gradients = 33 * 1024
    assert all(point["peak"] <= point["bound"] + 2 * gradients for point in points)
    assert all(point["copies"] <= 2.1 for point in saved if "copies" in point)


@pytest.mark.usefixtures("_sibling_imports")
def test_overheads_and_growth_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "overheads.json"
    sizes = ["--poses", "2", "4", "--parameters", "2", "8", "--sizes", "128", "256", "--repeats", "1"]
    run_script(monkeypatch, "overheads.py", *sizes, "--save", str(path))
    printed = capsys.readouterr().out
    assert "| all poses plain " in printed
    grown = [each for each in json.loads(path.read_text()) if "bytes_per_pose" in each]
    by_accumulator = {each["accumulator"]: [] for each in grown}
    for each in grown:
        by_accumulator[each["accumulator"]].append(each["bytes_per_pose"])
    assert all(many == pytest.approx(few, abs=8) for few, many in by_accumulator.values()), by_accumulator
    assert all(few < 500 for few, _ in by_accumulator.values())


@pytest.mark.usefixtures("_sibling_imports")
def test_the_cost_of_the_wrapper_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "costs.json"
    run_script(monkeypatch, "wrapper_cost.py", "--groups", "0", "2", "--repeats", "1", "--save", str(path))
    assert "| list, collate=, mean, torch.float32 " in capsys.readouterr().out
    saved = json.loads(path.read_text())
    assert {(each["groups"], each["combination"], each["grad"]) for each in saved} >= {
        (0, "mean", True),
        (2, "boltzmann", False),
    }
    assert all(each["plain"] > 0 for each in saved)


@pytest.mark.usefixtures("_sibling_imports")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peers, if installed
def test_embeddings_are_compared_with_their_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.json"
    sizes = ["--sizes", "16", "--chunks", "4", "--width", "16", "--embedding", "64", "--layers", "1", "--tokens", "4"]
    run_script(monkeypatch, "embeddings.py", *sizes, "--repeats", "1", "--save", str(path))
    assert "| MultiPose, memory=0 " in capsys.readouterr().out
    saved = {each["way"]: each for each in json.loads(path.read_text())}
    assert all(each["error"] < 1e-4 for each in saved.values())
    assert saved["MultiPose, memory=0"]["peak_ratio"] < 1.3  # tiny embeddings, beside which blocks of 64 KiB show
    assert saved["MultiPose, memory=0"]["lines"] == 2 < saved["two passes"]["lines"]


@pytest.mark.usefixtures("_sibling_imports")
def test_a_part_that_fails_or_hangs_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import on_device  # noqa: PLC0415 - on sys.path in this test only

    codes = {"hangs": "import time; time.sleep(99)", "fails": "raise SystemExit(3)", "works": "print('it', 'works')"}
    parts = [on_device.Part(name, 1, ["-I", "-c", code]) for name, code in codes.items()]
    monkeypatch.setattr(on_device, "parts_of", lambda _: parts)
    monkeypatch.setattr(on_device, "LEAST", 2)
    with pytest.raises(SystemExit, match="some parts failed or were stopped"):
        on_device.main(["--device", "cpu", "--folder", str(tmp_path), "--minutes", "0"])
    report = (tmp_path / "report.md").read_text()
    ended = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in report.splitlines() if row.count("|") == 4}
    assert ended == {
        "part": "result",
        "---": "---",
        "hangs": "stopped after 2 s",
        "fails": "exit code 3",
        "works": "ok",
    }
    assert "it works" in report
    assert f"torch {version('torch')}" in report


@pytest.mark.long
def test_the_command_for_a_gpu_runs_on_the_python_device(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "on_device.py"), "--device", "python_device", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "report.md").read_text()[-8000:]


def test_pose_parallel_measures_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "sharing.json"
    options = ["--ranks", "2", "--poses", "2", "--repeats", "1", "--save", str(path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "pose_parallel.py"), *options],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert "sharing adds |" in done.stdout
    saved = json.loads(path.read_text())
    assert [(cost["ranks"], cost["poses"]) for cost in saved] == [(2, 4), (2, 4)]
    assert all(cost["separate_seconds"] > 0 and cost["sent_bytes"] > 0 for cost in saved)


@pytest.mark.long
def test_uneven_poses_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "uneven.json"
    options = ["--ranks", "2", "--poses", "4", "--significant", "2", "--repeats", "1", "--save", str(path)]
    command = [sys.executable, str(BENCHMARKS / "uneven_poses.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert "backwards on each rank" in done.stdout
    assert [figure["backwards"] for figure in json.loads(path.read_text())] == [[4, 4], [1, 1], [2, 0]]

"""Run everything that concerns a GPU, one part after the other, and write one report: waits, tests, all benchmarks.

    python examples/benchmarks/on_device.py                            # cuda; at most ten minutes
    python examples/benchmarks/on_device.py --minutes 60               # more time for the tests
    python examples/benchmarks/on_device.py --device python_device     # tries the command itself, on any machine

Each part has a share of the time and runs in a process of its own. One that fails, or whose time is over, does not stop
the others: the report says how each ended, and has the end of its output. Not yet run on CUDA.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON_DEVICE = "python_device"
PACKAGES = ("torch", "torch_geometric", "sentence-transformers", "GradCache", "transformers", "timm")
LINES = 150
"""Of the output of a part, in the report."""
LEAST = 5
"""Seconds that a part has in any case."""
GRACE = 20
"""Seconds in which a part that is interrupted may print what it has."""


class Part(NamedTuple):
    """A command of the whole.

    Attributes:
        name: The name of its output.
        share: Its share of the time.
        command: The arguments of Python.
        small: The arguments that replace those after `command` for a short trial.
        full: The arguments after `command`.
    """

    name: str
    share: float
    command: Sequence[str]
    full: Sequence[str] = ()
    small: Sequence[str] = ()


def parts_of(device: str) -> list[Part]:
    """Return all parts for a device; what costs little and says much comes first."""

    def benchmark(name: str, share: float, full: str = "", small: str = "", *, script: str = "") -> Part:
        command = [str(HERE / f"{script or name}.py"), "--device", device]
        return Part(name, share, command, full.split(), small.split())

    large = "schnet transformer resnet" if find_spec("torch_geometric") else "transformer resnet"
    small = "mlp schnet" if find_spec("torch_geometric") else "mlp"
    several = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-r", "fEs"]
    sharing = "cuda" if device.startswith("cuda") else "cpu"
    trial = ["tests/test_running_sums.py", "tests/test_device_memory.py"]
    return [
        benchmark("waits", 0.1, "--lines"),
        Part("core tests", 0.25, pytest, [*several, "-m", "core and not long", "tests"], ["-n", "0", *trial]),
        benchmark("small poses", 0.08, f"--models {small} --sizes 4 16 --groups 1 8 --repeats 5",
                  "--models mlp --sizes 4 --groups 2 --repeats 1", script="batches"),
        benchmark("embeddings", 0.1, "--sizes 256 1024 --chunks 32 --width 512 --layers 4 --tokens 64 --repeats 5",
                  "--sizes 16 --chunks 4 --width 16 --embedding 64 --layers 1 --tokens 4 --repeats 1"),
        benchmark("large poses", 0.15, f"{large} --repeats 5", "resnet --poses 2 --repeats 1", script="report"),
        benchmark("batches of groups", 0.06, "--models mlp --sizes 16 64 --groups 32 --repeats 5",
                  "--models mlp --sizes 2 --groups 2 --repeats 1", script="batches"),
        benchmark("memory curve", 0.06, "", "--model mlp --group-size 2 --groups 2 --many 4", script="memory_curve"),
        Part("pose parallel", 0.05, [str(HERE / "pose_parallel.py"), "--device", sharing, "--ranks", "1"],
             ["--poses", "8", "64"], ["--poses", "2", "--repeats", "1"]),
        Part("other tests", 0.15, pytest, [*several, "-m", "not core and not long", "tests"], ["-n", "0", trial[0]]),
    ]  # fmt: skip


def run(part: Part, device: str, output: Path, seconds: float, *, small: bool) -> str:
    """Run a part; return how it ended."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "GRADHOOKS_TEST_DEVICE": device, "PYTHONPATH": os.pathsep.join(paths)}
    command = [*part.command, *(part.small if small else part.full)]
    if device == PYTHON_DEVICE and part.command[0] != "-m":  # a script, which does not register the device
        command = ["-c", _REGISTERED, *command]
    with output.open("w") as file:
        return _ended([sys.executable, *command], environment, file, seconds)


def _ended(command: Sequence[str], environment: dict[str, str], output: IO[str], seconds: float) -> str:
    """Run a command, interrupted when its time is over; return how it ended."""
    process = subprocess.Popen(  # noqa: S603 - the commands of `parts_of`
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then prints the failures so far
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return f"stopped after {seconds:.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


_REGISTERED = (
    "import runpy, sys, python_device; python_device.register(); "
    "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def setting_of(device: str) -> str:
    """Return what the figures depend on."""
    import torch  # noqa: PLC0415 - the parts import it in processes of their own

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    cuda = f"CUDA {torch.version.cuda}, " if device.startswith("cuda") else ""
    found = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    return f"{name}, {cuda}{datetime.now(tz=timezone.utc):%Y-%m-%d}\n\n{found}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_report(folder: Path, setting: str, results: dict[str, tuple[str, float]]) -> None:
    """Write how each part ended, and the end of its output."""
    rows = [f"| {name} | {result} | {seconds:.0f} |" for name, (result, seconds) in results.items()]
    lines = [f"# {setting}", "", "| part | result | seconds |", "|---|---|---:|", *rows]
    for name in results:
        output = (folder / f"{name}.txt").read_text(errors="replace").splitlines()
        lines += ["", f"## {name}", "", "```", *output[-LINES:], "```"]
    (folder / "report.md").write_text("\n".join([*lines, ""]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts from the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda", help="default: %(default)s")
    options.add_argument("--folder", type=Path, default=Path("on_device"), help="for the output (default: %(default)s)")
    options.add_argument("--minutes", type=float, default=9.5, help="for all parts (default: %(default)s)")
    options.add_argument("--small", action="store_true", help="the least sizes, to try the command")
    options.add_argument("--only", nargs="+", metavar="PART", help="the parts to run (default: all)")
    chosen = options.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in parts_of(chosen.device) if not chosen.only or part.name in chosen.only]
    end = time.monotonic() + 60 * chosen.minutes
    setting, results = setting_of(chosen.device), {}
    for place, part in enumerate(parts):
        start = time.monotonic()
        # What earlier parts have left of their time goes to the later ones.
        left = (end - start) * part.share / sum(other.share for other in parts[place:])
        small = chosen.small or chosen.device == PYTHON_DEVICE
        try:
            result = run(
                part, chosen.device, chosen.folder / f"{part.name}.txt", max(left - GRACE / 2, LEAST), small=small
            )
        except OSError as error:
            result = f"not started: {error}"
        results[part.name] = result, time.monotonic() - start
        print(f"{part.name}: {result}, {results[part.name][1]:.0f} s", flush=True)
        write_report(chosen.folder, setting, results)
    if any(result != "ok" for result, _ in results.values()):
        raise SystemExit(f"some parts failed or were stopped; see {chosen.folder / 'report.md'}")


if __name__ == "__main__":
    main()

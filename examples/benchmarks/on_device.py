"""Run everything that concerns a GPU, one after the other, and write a report: tests, waits, all benchmarks.

    python examples/benchmarks/on_device.py                            # cuda; about an hour
    python examples/benchmarks/on_device.py --device python_device     # tries the command itself, on any machine

A part that fails does not stop the others: its output is in the folder, and the report says so. Not yet run on CUDA.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON_DEVICE = "python_device"


class Part(NamedTuple):
    """A command of the whole.

    Attributes:
        name: The name of its files.
        command: The arguments of Python.
        small: More arguments, with which it takes seconds.
        cuda_only: Whether it needs CUDA.
    """

    name: str
    command: Sequence[str]
    small: Sequence[str] = ()
    cuda_only: bool = False


def parts_of(device: str) -> list[Part]:
    """Return all commands for a device."""

    def benchmark(name: str, *arguments: str, small: Sequence[str] = ()) -> Part:
        return Part(name, [str(HERE / f"{name}.py"), "--device", device, *arguments], small)

    one_by_one = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", ""]
    return [
        benchmark("waits", "--lines"),
        Part("tests", [*one_by_one, "tests"], ["tests/test_running_sums.py", "tests/test_device_memory.py"]),
        benchmark("report", small=["resnet", "--poses", "2", "--repeats", "1"]),
        benchmark("targets", small=["resnet", "--poses", "2", "--long-group", "12", "--repeats", "1"]),
        benchmark("batches", small=["--models", "mlp", "--sizes", "4", "--groups", "2", "--repeats", "1"]),
        benchmark("memory_curve", small=["--model", "mlp", "--group-size", "2", "--groups", "2", "--many", "4"]),
        Part(
            "pose_parallel",
            ["-m", "torch.distributed.run", "--nproc-per-node", "1", "examples/pose_parallel.py", "--device", device],
            cuda_only=True,
        ),
    ]


def run(part: Part, device: str, folder: Path, *, small: bool) -> tuple[str, float]:
    """Run a part; return how it ended and its seconds."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "GRADHOOKS_TEST_DEVICE": device, "PYTHONPATH": os.pathsep.join(paths)}
    command = [*part.command]
    if small and part.name == "tests":
        command.remove("tests")
    start = time.perf_counter()
    with (folder / f"{part.name}.txt").open("w") as output:
        if device == PYTHON_DEVICE and part.command[0] != "-m":  # a script, which does not register the device
            command = ["-c", _REGISTERED, *command]
        ended = subprocess.run(  # noqa: S603 - the commands above
            [sys.executable, *command, *(part.small if small else ())],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    return "ok" if ended.returncode == 0 else f"exit code {ended.returncode}", time.perf_counter() - start


_REGISTERED = (
    "import runpy, sys, python_device; python_device.register(); "
    "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def setting_of(device: str) -> str:
    """Return what the figures depend on."""
    import torch  # noqa: PLC0415 - the parts import it in processes of their own

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return f"{name}, torch {torch.__version__}, {datetime.now(tz=timezone.utc):%Y-%m-%d}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts from the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda", help="default: %(default)s")
    options.add_argument("--folder", type=Path, default=Path("on_device"), help="for the output (default: %(default)s)")
    options.add_argument("--small", action="store_true", help="the least sizes, to try the command")
    options.add_argument("--only", nargs="+", metavar="PART", help="the parts to run (default: all)")
    chosen = options.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    small = chosen.small or chosen.device == PYTHON_DEVICE
    lines = [f"# {setting_of(chosen.device)}", "", "| part | result | seconds |", "|---|---|---:|"]
    for part in parts_of(chosen.device):
        if chosen.only and part.name not in chosen.only:
            continue
        if part.cuda_only and not chosen.device.startswith("cuda"):
            lines.append(f"| {part.name} | needs CUDA | |")
        else:
            result, seconds = run(part, chosen.device, chosen.folder, small=small)
            lines.append(f"| {part.name} | {result} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    (chosen.folder / "report.md").write_text("\n".join([*lines, ""]))
    if any("exit code" in line for line in lines):
        raise SystemExit(f"some parts failed; their output is in {chosen.folder}")


if __name__ == "__main__":
    main()

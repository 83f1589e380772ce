"""Count how often a step waits for the device, and check that what runs once a chunk does not wait at all.

Each combination and accumulator is run under `torch.cuda.set_sync_debug_mode`, in two ways:

- "warn" counts the waits of a whole step: at most four, and with a named accumulator the same for 8 poses as for 64 in
  eight groups, so that no pose, chunk or group has one. `--lines` shows where they are.
- "error" is set around the parts that must not wait: a whole step whose poses run plainly, and the forward of stream,
  store and recompute, in which all chunks run, for stream and store with their backwards.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from command_line import markdown_table, parser, save
from torch import nn

import gradhooks

NAMED = ("stream", "store", "recompute")
ACCUMULATORS = (*NAMED, "auto")
COMBINATIONS = ("mean", "min", "max", "boltzmann", None)
SIZES = ((8, 1), (64, 8))
MOST = 4


@contextmanager
def sync_debug_mode(mode: str, device: torch.device) -> Iterator[None]:
    """Set what happens at a wait in the block: "warn" or "error"."""
    module: Any = torch.get_device_module(device)
    module.synchronize(device)
    module.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        module.set_sync_debug_mode("default")


def make_step(
    combination: str | None, options: dict[str, Any], size: tuple[int, int], device: torch.device, around: Any
) -> Callable[[], None]:
    """Return a training step, after two steps in which the model is examined and `auto` learns.

    Args:
        combination: The combination.
        options: Those of `MultiPose`.
        size: The numbers of poses and of groups.
        device: The device.
        around: Returns a context in which the forward of the step runs.
    """
    count, groups = size
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0)).to(device)
    scorer = gradhooks.MultiPose(model, combination, **options)
    poses = torch.randn(count, 16).to(device)
    index = [pose % groups for pose in range(count)] if groups > 1 else None

    def step(around: Any) -> None:
        with around():
            combined = scorer(poses, groups=index).combined
        combined.square().sum().backward()

    for _ in range(2):
        step(nullcontext)
    return lambda: step(around)


def waits_of(combination: str | None, accumulator: str, size: tuple[int, int], device: torch.device) -> Counter[str]:
    """Return the waits of a step, by line."""
    step = make_step(combination, {"accumulator": accumulator, "memory": 0}, size, device, nullcontext)
    with warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn", device):
        warnings.simplefilter("always")
        step()
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    return Counter(f"{warning.filename}:{warning.lineno}" for warning in waits)


def what_waits(device: torch.device) -> list[str]:
    """Return the parts that must not wait and do, with the error."""
    found = []

    def silent() -> Any:
        return sync_debug_mode("error", device)

    for combination in COMBINATIONS:
        for size in SIZES:
            steps: dict[str, Callable[[], None]] = {}
            plain = make_step(combination, {}, size, device, nullcontext)
            steps["a step of plain poses"] = lambda plain=plain: _run_in(silent(), plain)
            for name in NAMED:
                options = {"accumulator": name, "memory": 0, "chunk_size": 4}
                steps[f"the forward of {name}"] = make_step(combination, options, size, device, silent)
            for part, step in steps.items():
                error = _error_of(step)
                if error is not None:
                    found.append(f"{part}, {combination}, {size}: {error}")
    return found


def _error_of(step: Callable[[], None]) -> RuntimeError | None:
    try:
        step()
    except RuntimeError as error:
        return error
    return None


def _run_in(context: Any, step: Callable[[], None]) -> None:
    with context:
        step()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line; it fails if a step waits more often than it may."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--lines", action="store_true", help="print where the host waits")
    chosen = options.parse_args(arguments)
    device = torch.device(chosen.device)
    figures = []
    for combination in COMBINATIONS:
        for accumulator in ACCUMULATORS:
            lines = [waits_of(combination, accumulator, size, device) for size in SIZES]
            totals = [sum(of_size.values()) for of_size in lines]
            figures.append({"combination": str(combination), "accumulator": accumulator, "waits": totals})
            if chosen.lines:
                print(combination, accumulator, *(dict(of_size) for of_size in lines), sep="\n  ")
    headers = ["waits a step", "accumulator", *(f"M = {count}, B = {groups}" for count, groups in SIZES)]
    rows = [[row["combination"], row["accumulator"], *map(str, row["waits"])] for row in figures]
    print(markdown_table(headers, rows))
    loud = what_waits(device)
    print(f"parts that must not wait: {len(loud)} of {len(COMBINATIONS) * len(SIZES) * (1 + len(NAMED))} wait", *loud)
    save(figures, chosen.save)
    failed = [row for row in figures if max(row["waits"]) > MOST or (row["accumulator"] != "auto" and _differ(row))]
    if failed or loud:
        raise SystemExit(f"more than {MOST} waits, or one for each pose or chunk: {failed} {loud}")


def _differ(row: dict[str, Any]) -> bool:
    return len(set(row["waits"])) > 1


if __name__ == "__main__":
    main()

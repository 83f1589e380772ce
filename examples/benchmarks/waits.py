"""Count how often a step waits for the device, for each combination and accumulator: at most four times.

On CUDA it counts the warnings of `torch.cuda.set_sync_debug_mode("warn")`, which also shows their lines with `--lines`.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from command_line import markdown_table, parser, save
from torch import nn

import gradhooks

ACCUMULATORS = ("stream", "store", "recompute", "auto")
COMBINATIONS = ("mean", "min", "max", "boltzmann", None)
SIZES = ((8, 1), (64, 8))
MOST = 4


@contextmanager
def counted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count the waits in the block by their lines."""
    lines: Counter[str] = Counter()
    if device.type != "cuda":
        from python_device import count_waits  # noqa: PLC0415 - a folder of the tests

        with count_waits() as count:
            yield lines
        lines.update({f"{name} in {line}": times for (name, line), times in count.lines.items()})
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronizing = [warning for warning in caught if "synchroniz" in str(warning.message)]
    lines.update(f"{warning.filename}:{warning.lineno}" for warning in synchronizing)


def waits_of(combination: str | None, accumulator: str, size: tuple[int, int], device: torch.device) -> Counter[str]:
    """Return the waits of the third step, by line."""
    count, groups = size
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0)).to(device)
    scorer = gradhooks.MultiPose(model, combination, accumulator=accumulator, memory=0)
    poses = torch.randn(count, 16).to(device)
    index = [pose % groups for pose in range(count)] if groups > 1 else None

    def step() -> None:
        scorer(poses, groups=index).combined.square().sum().backward()

    step()
    step()
    with counted_waits(device) as lines:
        step()
    return lines


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
    print(
        markdown_table(headers, [[row["combination"], row["accumulator"], *map(str, row["waits"])] for row in figures])
    )
    save(figures, chosen.save)
    too_many = [row for row in figures if max(row["waits"]) > MOST]
    if too_many:
        raise SystemExit(f"more than {MOST} waits: {too_many}")


if __name__ == "__main__":
    main()

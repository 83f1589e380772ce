"""Measure the CPU time that a step with MultiPose takes beyond the same step in plain PyTorch, where all poses fit."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from command_line import flushed_denormals, markdown_table, parser, save
from torch import Tensor, nn

from gradhooks import Groups, MultiPose
from gradhooks.combinations import Boltzmann, Mean, Min

PER_BATCH = 150e-6
PER_POSE = 2e-6
"""Seconds that a batch may cost, and each of its poses."""

MICRO = 1e6
WARM_UP_STEPS = 20
FEATURES = 16
COMBINATIONS: Mapping[str, Any] = {"mean": Mean(), "min": Min(1.0), "boltzmann": Boltzmann(1.0), "none": None}


class Form(NamedTuple):
    """A form in which poses are passed.

    Attributes:
        poses: Makes the poses of a stack of shape `(M, features)`.
        together: Makes the model's input for all poses, in the plain step; None where they run one by one.
        collate: The option of `MultiPose`.
    """

    poses: Callable[[Tensor], Any]
    together: Callable[[Any], Any] | None
    collate: Callable[[list[Any]], Any] | None = None


class Named(nn.Module):
    """An MLP whose input may also be named `x`, or be the `x` of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Any) -> Tensor:
        rows: Tensor = self.layers(x if isinstance(x, Tensor) else x.x)
        return rows.squeeze(-1)


def forms() -> dict[str, Form]:
    """Return the forms by name; graphs only where PyTorch Geometric is installed."""
    found = {
        "stack": Form(lambda stack: stack, lambda poses: poses),
        "mapping": Form(lambda stack: {"x": stack}, lambda poses: poses["x"]),
        "list, collate=": Form(list, torch.stack, torch.stack),
        "list": Form(list, None),
    }
    try:
        from torch_geometric.data import Batch, Data  # noqa: PLC0415 - optional
    except ModuleNotFoundError:
        return found
    collate = Batch.from_data_list
    return {**found, "graphs": Form(lambda stack: [Data(x=row[None]) for row in stack], collate, collate)}


class Cost(NamedTuple):
    """What a step costs.

    Attributes:
        form: The form of the poses.
        combination: The combination.
        groups: B, the number of groups.
        poses: M, the number of poses.
        dtype: The dtype of model and poses.
        grad: Whether the step has a backward.
        plain: Seconds of the plain step, which calls the same combination.
        extra: Seconds beyond it.
    """

    form: str
    combination: str
    groups: int
    poses: int
    dtype: str
    grad: bool
    plain: float
    extra: float

    @property
    def share(self) -> float:
        """What the step costs beyond the plain one, relative to what is allowed."""
        return self.extra / (PER_BATCH + PER_POSE * self.poses)


def cost(form: str, combination: str, groups: int, size: int, dtype: torch.dtype, grad: bool, repeats: int) -> Cost:
    """Measure one case: the fastest of `repeats` steps of each kind, which is without noise."""
    way, together = forms()[form], forms()[form].together
    torch.manual_seed(0)
    model = Named().to(dtype)
    poses = way.poses(torch.randn(groups * size, FEATURES, dtype=dtype))
    index = torch.arange(groups).repeat_interleave(size)
    combine = COMBINATIONS[combination]
    scorer = MultiPose(model, combine, collate=way.collate)
    passed = Groups(poses, index, groups)

    def ours() -> Tensor:
        return scorer(passed).combined

    def plainly() -> Tensor:
        rows = torch.stack([model(pose) for pose in poses]) if together is None else model(together(poses))
        return rows if combine is None else combine.forward_groups(rows, index, groups)

    with torch.set_grad_enabled(grad), flushed_denormals():
        steps = [partial(_step, model, each, grad) for each in (plainly, ours)]
        for step in WARM_UP_STEPS * steps:
            step()
        best = _fastest(steps, repeats)
    return Cost(form, combination, groups, groups * size, str(dtype), grad, best[0], best[1] - best[0])


def _step(model: nn.Module, forward: Callable[[], Tensor], grad: bool) -> None:
    model.zero_grad()
    result = forward().sum()
    if grad:
        result.backward()


def _fastest(steps: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Return the least CPU time of each step in interleaved rounds. It leaves out what other processes take."""
    best = [float("inf")] * len(steps)
    for _ in range(repeats):
        for number, step in enumerate(steps):
            start = time.thread_time()
            step()
            best[number] = min(best[number], time.thread_time() - start)
    return best


def costs(sizes: Sequence[tuple[int, int]], repeats: int) -> Iterator[Cost]:
    """Measure all forms, combinations and numbers of groups, then other dtypes and no gradient with stacks."""
    for groups, size in sizes:
        for form in forms():
            yield cost(form, "mean", groups, size, torch.float32, True, repeats)
        for combination in COMBINATIONS:
            yield cost("stack", combination, groups, size, torch.float64, True, repeats)
            yield cost("stack", combination, groups, size, torch.float32, False, repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parser(__doc__, repeats=300)
    options.add_argument("--groups", nargs="+", type=int, default=[1, 8, 256], help="default: %(default)s")
    options.add_argument("--size", type=int, default=4, help="poses of a group (default: %(default)s)")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    measured = list(costs([(groups, chosen.size) for groups in chosen.groups], chosen.repeats))
    headers = ["CPU time in microseconds", "groups", "plain step", "beyond it", "of 150 + 2 a pose"]
    rows = [
        [
            f"{each.form}, {each.combination}, {each.dtype}{'' if each.grad else ', no_grad'}",
            str(each.groups),
            f"{MICRO * each.plain:.0f}",
            f"{MICRO * each.extra:.0f}",
            f"{each.share:.2f}",
        ]
        for each in measured
    ]
    print(markdown_table(headers, rows))
    save([each._asdict() for each in measured], chosen.save)


if __name__ == "__main__":
    main()

"""Measure the CPU time that a step with MultiPose takes beyond the same step in plain PyTorch, where all poses fit."""

import time
import warnings
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing it uses functions that newer releases of torch deprecate
            from torch_geometric.data import Batch, Data  # noqa: PLC0415 - optional
    except ModuleNotFoundError:
        return found
    collate = Batch.from_data_list
    return {**found, "graphs": Form(lambda stack: [Data(x=row[None]) for row in stack], collate, collate)}


class Case(NamedTuple):
    """A step.

    Attributes:
        form: The form of the poses.
        combination: The combination.
        groups: B, the number of groups; 0 for one group without `groups=`.
        size: Poses of a group.
        dtype: The dtype of model and poses.
        grad: Whether the step has a backward.
    """

    form: str
    combination: str
    groups: int
    size: int
    dtype: torch.dtype = torch.float32
    grad: bool = True

    @property
    def poses(self) -> int:
        """M, the number of poses."""
        return max(1, self.groups) * self.size

    def __str__(self) -> str:
        return f"{self.form}, {self.combination}, {self.dtype}{'' if self.grad else ', no_grad'}"


class Cost(NamedTuple):
    """What a step costs.

    Attributes:
        case: The step.
        plain: Seconds of the plain step, which calls the same combination.
        extra: Seconds beyond it.
    """

    case: Case
    plain: float
    extra: float

    @property
    def share(self) -> float:
        """What the step costs beyond the plain one, relative to what is allowed."""
        return self.extra / (PER_BATCH + PER_POSE * self.case.poses)


def cost(case: Case, repeats: int) -> Cost:
    """Measure one case: the fastest of `repeats` steps of each kind, which is without noise."""
    form = forms()[case.form]
    torch.manual_seed(0)
    model = Named().to(case.dtype)
    poses = form.poses(torch.randn(case.poses, FEATURES, dtype=case.dtype))
    index = torch.arange(case.groups).repeat_interleave(case.size)
    combine = COMBINATIONS[case.combination]
    scorer = MultiPose(model, combine, collate=form.collate)
    passed = Groups(poses, index, case.groups) if case.groups else poses

    def ours() -> Tensor:
        return scorer(passed).combined

    def plainly() -> Tensor:
        rows = torch.stack([model(pose) for pose in poses]) if form.together is None else model(form.together(poses))
        if combine is None:
            return rows
        return combine.forward_groups(rows, index, case.groups) if case.groups else combine(rows)

    with torch.set_grad_enabled(case.grad), flushed_denormals():
        steps = [partial(_step, model, each, case.grad) for each in (plainly, ours)]
        for step in WARM_UP_STEPS * steps:
            step()
        best = _fastest(steps, repeats)
    return Cost(case, best[0], best[1] - best[0])


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


def cases(groups: Sequence[int], size: int) -> Iterator[Case]:
    """Yield all forms, combinations and numbers of groups; then other dtypes and no gradient, with stacks."""
    for count in groups:
        for form in forms():
            yield Case(form, "mean", count, size)
        for combination in COMBINATIONS:
            yield Case("stack", combination, count, size, torch.float64)
            yield Case("stack", combination, count, size, grad=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parser(__doc__, repeats=300)
    counts = [0, 1, 8, 256]
    options.add_argument(
        "--groups", nargs="+", type=int, default=counts, help="0: one group without groups= (%(default)s)"
    )
    options.add_argument("--size", type=int, default=4, help="poses of a group (default: %(default)s)")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    measured = [cost(case, chosen.repeats) for case in cases(chosen.groups, chosen.size)]
    headers = ["CPU time in microseconds", "groups", "plain step", "beyond it", "of 150 + 2 a pose"]
    rows = [
        [
            str(each.case),
            str(each.case.groups),
            f"{MICRO * each.plain:.0f}",
            f"{MICRO * each.extra:.0f}",
            f"{each.share:.2f}",
        ]
        for each in measured
    ]
    print(markdown_table(headers, rows))
    figures = [{**each.case._asdict(), "dtype": str(each.case.dtype), **each._asdict()} for each in measured]
    save([{name: value for name, value in figure.items() if name != "case"} for figure in figures], chosen.save)


if __name__ == "__main__":
    main()

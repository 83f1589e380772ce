"""Random cases against plain PyTorch: models, combinations, groups, accumulators, memory, chunks, losses, orders.

    python tests/random_cases.py --cases 3000 --seed 0

Prints each case whose gradients differ from those of the full graph by more than 1e-9, relative to the largest. Two
batches are open at once, and their backwards run in either order; then comes a second step.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradhooks
from gradhooks.combinations import Boltzmann, Max, Mean, Min

TOLERANCE = 1e-9
COMBINATIONS: dict[str, Any] = {
    "mean": Mean,
    "max": Max,
    "min": Min,
    "soft min": lambda: Min(scale=1.5),
    "boltzmann": Boltzmann,
    "learnable": lambda: Boltzmann(0.9, learnable=True),
    "function": lambda: lambda predictions: predictions.square().sum(0),
    "none": lambda: None,
}


class Case(NamedTuple):
    """A case, drawn at random. Random numbers in the model need chunks of one pose, so that both runs draw the same."""

    seed: int
    outputs: int
    dropout: float
    normalization: str
    training: bool
    poses: int
    groups: int | None
    combination: str
    accumulator: str
    memory: int | str
    chunk_size: int | None
    form: str
    tolerance: float | None
    nonfinite: str
    broken: int | None
    loss: str
    reads_inputs: bool
    first_backward: int


def draw_case(seed: int) -> Case:
    """Draw a case."""
    draw = random.Random(seed)  # noqa: S311
    poses = draw.choice([1, 2, 5, 9, 14])
    groups = draw.choice([None, 1, 2, 4])
    combination, accumulator = (
        draw.choice(list(COMBINATIONS)),
        draw.choice(["auto", "auto", "recompute", "stream", "store"]),
    )
    nonfinite = "propagate" if combination == "none" else draw.choice(["propagate", "propagate", "drop"])
    normalization, dropout = draw.choice(["none", "layer", "batch"]), draw.choice([0.0, 0.0, 0.3])
    return Case(
        seed=seed,
        outputs=draw.choice([1, 1, 1, 3]),
        dropout=dropout,
        normalization=normalization,
        training=draw.random() < 0.7 and normalization != "batch",
        poses=poses,
        groups=None if groups is None else min(groups, poses),
        combination=combination,
        accumulator=accumulator,
        memory=draw.choice([0, 0, 1500, 4000, 20_000, 60_000, "1GiB"]),
        chunk_size=draw.choice([None, 1, 3]) if not dropout else 1,
        form=draw.choice(["stack", "list", "collate"]),
        tolerance=None if accumulator == "store" else draw.choice([None, None, 0.0]),
        nonfinite=nonfinite,
        broken=draw.randrange(poses) if nonfinite == "drop" and poses > 1 and draw.random() < 0.5 else None,
        loss=draw.choice(["combined", "poses", "both", "one pose"]),
        reads_inputs=draw.random() < 0.2,
        first_backward=draw.randrange(2),
    )


def make_model(case: Case) -> nn.Module:
    """Return the model of a case."""
    norm = {"none": nn.Identity(), "layer": nn.LayerNorm(8), "batch": nn.BatchNorm1d(8)}[case.normalization]
    layers = [nn.Linear(6, 8), norm, nn.Tanh(), nn.Dropout(case.dropout), nn.Linear(8, case.outputs)]
    return nn.Sequential(*layers).double().train(case.training)


def make_inputs(case: Case, number: int) -> Tensor:
    """Return the poses of a batch, shape `(poses, 6)`; a broken one makes its prediction NaN."""
    generator = torch.Generator().manual_seed(1000 * case.seed + number)
    inputs = torch.randn(case.poses, 6, dtype=torch.float64, generator=generator)
    if case.broken is not None:
        inputs[case.broken] = torch.nan
    return inputs.requires_grad_(case.reads_inputs and case.broken is None)


def group_index(case: Case) -> Tensor | None:
    """Return the group of each pose: every group has one, in random order."""
    if case.groups is None:
        return None
    generator = torch.Generator().manual_seed(case.seed)
    index = torch.cat(
        [torch.arange(case.groups), torch.randint(case.groups, (case.poses - case.groups,), generator=generator)]
    )
    return index[torch.randperm(case.poses, generator=generator)]


def loss_of(case: Case, combined: Tensor, per_pose: Tensor) -> Tensor:
    """Return the loss of a batch."""
    kept = [pose for pose in range(case.poses) if pose != case.broken]
    on_poses = per_pose[kept].tanh().square().sum()
    on_combined = (combined - 0.3).square().sum()
    if case.combination == "none":
        return on_poses
    losses = {"combined": on_combined, "poses": on_poses, "both": on_combined + 0.5 * on_poses}
    return losses.get(case.loss, per_pose[kept[-1]].square().sum())


def reference(case: Case, model: nn.Module, combination: Any, batches: Sequence[Tensor]) -> None:
    """Run the backward of all batches in plain PyTorch, without poses that are dropped."""
    index = group_index(case)
    total: Any = 0.0
    for inputs in batches:
        rows = torch.cat([model(inputs[pose : pose + 1]) for pose in range(case.poses)])
        kept = torch.tensor([pose for pose in range(case.poses) if pose != case.broken])
        if combination is None:
            combined = rows
        elif index is None:
            combined = combination(rows[kept])
        else:
            combined = torch.stack([combination(rows[kept][index[kept] == group]) for group in range(case.groups or 1)])
        total = total + loss_of(case, combined, rows)
    total.backward()


def multi_pose(case: Case, scorer: Any, batches: Sequence[Tensor]) -> None:
    """Run the backward of all batches with gradhooks, all of them open at once."""
    index = group_index(case)
    losses = []
    for inputs in batches:
        poses: Any = inputs if case.form == "stack" else list(inputs.unbind())
        prediction = scorer(poses) if index is None else scorer(poses, groups=index)
        losses.append(loss_of(case, prediction.combined, prediction.per_pose))
    for number in (case.first_backward, 1 - case.first_backward):
        losses[number].backward()


def error_of(case: Case) -> float:
    """Return the largest error of a gradient in two steps, relative to the largest gradient; inf if one is missing."""
    torch.manual_seed(case.seed)
    model, combination = make_model(case), COMBINATIONS[case.combination]()
    if isinstance(combination, nn.Module):
        combination.double()
    scorer = gradhooks.MultiPose(
        model,
        combination,
        accumulator=case.accumulator,
        memory=case.memory,
        chunk_size=None if case.form == "list" else case.chunk_size,
        collate=torch.stack if case.form == "collate" else None,
        call=(lambda model, pose: model(pose.unsqueeze(0)).squeeze(0)) if case.form == "list" else None,
        tolerance=case.tolerance,
        nonfinite=case.nonfinite,  # type: ignore[arg-type]
    )
    leaves = [*model.parameters(), *(combination.parameters() if isinstance(combination, nn.Module) else ())]
    worst = 0.0
    for step in range(2):
        batches = [make_inputs(case, 2 * step + number) for number in range(2)]
        results = []
        for run in (
            lambda batches: multi_pose(case, scorer, batches),
            lambda batches: reference(case, model, combination, batches),
        ):
            for leaf in (*leaves, *batches):
                leaf.grad = None
            torch.manual_seed(step)
            run(batches)
            results.append([None if leaf.grad is None else leaf.grad.clone() for leaf in (*leaves, *batches)])
        worst = max(worst, _difference(*results))
    return worst


def _difference(actual: list[Tensor | None], expected: list[Tensor | None]) -> float:
    if [gradient is None for gradient in actual] != [gradient is None for gradient in expected]:
        return float("inf")
    pairs = [(one, other) for one, other in zip(actual, expected, strict=True) if one is not None and other is not None]
    largest = max([1e-12, *(float(other.abs().max()) for _, other in pairs)])
    return max([0.0, *(float((one - other).abs().max()) / largest for one, other in pairs)])


def failures_of(cases: int, seed: int) -> list[str]:
    """Run random cases and describe those that are off."""
    failures = []
    for number in range(cases):
        case = draw_case(1_000_000 * seed + number)
        if case.broken is not None and _loses_a_group(case):
            continue
        try:
            error = error_of(case)
        except Exception as raised:
            failures.append(f"{type(raised).__name__}: {raised}: {case}")
            continue
        if not error <= TOLERANCE:
            failures.append(f"{error:.1e}: {case}")
    return failures


def _loses_a_group(case: Case) -> bool:
    index = group_index(case)
    return index is not None and int((index == index[case.broken or 0]).sum()) == 1


def main() -> None:
    """Run many cases and print those that are off."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures = failures_of(options.cases, options.seed)
    lines = [f"seed {options.seed}: {options.cases} cases, {len(failures)} off by more than {TOLERANCE:.0e}", *failures]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

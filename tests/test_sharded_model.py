"""Sharded parameters, by FSDP2 in several arrangements and by tensor parallelism, against a single process."""

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import error_of, log_messages, run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from unwatched import Unwatched

import gradhooks
from gradhooks.testing import full_graph

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="FSDP2 and tensor parallelism run on a CPU from torch 2.7 on"
)


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), inner, nn.Sequential(nn.Linear(8, 1), nn.Softplus())).double()


def whole_model(model: nn.Sequential, **options: Any) -> gradhooks.MultiPose:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not imported by processes without shards

    fully_shard(model)
    return gradhooks.MultiPose(model, **options)


def nested(model: nn.Sequential, **options: Any) -> gradhooks.MultiPose:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    for part in (model[2], model[3], model):
        fully_shard(part)
    return gradhooks.MultiPose(model, **options)


def nested_and_replicated(model: nn.Sequential, **options: Any) -> gradhooks.MultiPose:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for part in (model[2], model):
        fully_shard(part, mesh=mesh)
    return gradhooks.MultiPose(model, **options)


def around_multipose(model: nn.Sequential, **options: Any) -> gradhooks.MultiPose:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    scorer = gradhooks.MultiPose(model, **options)
    fully_shard(scorer)
    return scorer


def tensor_parallel(model: nn.Sequential, **options: Any) -> gradhooks.MultiPose:
    from torch.distributed.tensor.parallel import (  # noqa: PLC0415
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2.0": RowwiseParallel()})
    return gradhooks.MultiPose(model, **options)


Arrange = Callable[..., gradhooks.MultiPose]
ARRANGEMENTS: dict[str, Arrange] = {
    arrange.__name__: arrange
    for arrange in (whole_model, nested, nested_and_replicated, around_multipose, tensor_parallel)
}


def groups_of(seed: int, ranks: int, size: int) -> list[list[Tensor]]:
    """Return one group for each rank, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [list(torch.randn(size + 2 * rank, 4, generator=generator, dtype=torch.float64)) for rank in range(ranks)]


def of_both(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum() + prediction.per_pose.tanh().mean()


def of_combined(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum()


LOSSES = (of_both, of_combined)


def full_tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_loss(
    reference: nn.Module, groups: list[list[Tensor]], combination: Any, loss: Callable[..., Tensor] = of_both
) -> Tensor:
    """Return the mean loss of several groups by the full graph."""
    losses = [loss(full_graph(reference, poses, combination)) for poses in groups]
    return sum(losses, torch.zeros(())) / len(groups)


def deviation(model: nn.Module, reference: nn.Module) -> float:
    """Return the largest deviation of a gradient."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max((full_tensor(actual.grad) - full_tensor(expected.grad)).abs().max().item() for actual, expected in pairs)


def train(rank: int, arrangement: str, loss: Callable[..., Tensor], **options: Any) -> float:
    """Train for three steps; return the largest deviation from a single process."""
    model = new_model()
    reference = copy.deepcopy(model)
    scorer = ARRANGEMENTS[arrangement](model, **options)
    combination = copy.deepcopy(scorer.combination)
    is_data_parallel = arrangement != "tensor_parallel"  # all tensor-parallel ranks work on the same group
    ranks = dist.get_world_size() if is_data_parallel else 1
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, reference)]
    largest = 0.0
    for step in range(3):
        groups = groups_of(step, ranks, 3)
        if step != 1:  # step 1 adds to the gradients of step 0
            for optimizer in optimizers:
                optimizer.zero_grad()
        loss(scorer(groups[rank if is_data_parallel else 0])).backward()
        mean_loss(reference, groups, combination, loss).backward()
        largest = max(largest, deviation(model, reference))
        if step:  # keeps the parameters of step 0 for step 1
            for optimizer in optimizers:
                optimizer.step()
    return largest


CASES: dict[str, dict[str, Any]] = {
    "mean": {"combination": "mean"},
    "boltzmann": {"combination": "boltzmann"},
    "sharp": {"combination": gradhooks.combinations.Min(scale=300.0)},
    "chunks of 2, recompute": {
        "combination": "boltzmann",
        "accumulator": "recompute",
        "chunk_size": 2,
        "collate": torch.stack,
    },
    "chunks of 3": {"combination": "max", "chunk_size": 3, "collate": torch.stack},
}


def train_all(rank: int, arrangements: list[str], every_loss: bool) -> dict[str, float]:
    """Train in all arrangements and cases, with every loss or with the next one each time."""
    turns = itertools.cycle(LOSSES)
    return {
        f"{arrangement} {name} {loss.__name__}": train(rank, arrangement, loss, **options)
        for arrangement in arrangements
        for name, options in CASES.items()
        for loss in (LOSSES if every_loss else [next(turns)])
    }


ON_TWO_RANKS = ["whole_model", "nested", "around_multipose", "tensor_parallel"]


@pytest.mark.parametrize(
    ("world_size", "arrangements", "every_loss"),
    [
        (2, ON_TWO_RANKS, False),
        pytest.param(2, ON_TWO_RANKS, True, marks=pytest.mark.long),
        pytest.param(4, ["nested_and_replicated"], True, marks=pytest.mark.long),  # a mesh with two axes
    ],
)
def test_gradients_are_those_of_one_process(world_size: int, arrangements: list[str], every_loss: bool) -> None:
    for errors in run_on_ranks(train_all, arrangements, every_loss, world_size=world_size, timeout=120):
        assert len(errors) == len(arrangements) * len(CASES) * (2 if every_loss else 1)
        assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


def count_collectives(rank: int, arrangement: str, size: int) -> int:
    scorer = ARRANGEMENTS[arrangement](new_model())
    for step in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            of_both(scorer(groups_of(step, 2, size)[rank])).backward()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("gloo:"))


def count_all_collectives(rank: int) -> dict[str, list[int]]:
    return {
        arrangement: [count_collectives(rank, arrangement, size) for size in (3, 12)]
        for arrangement in ("whole_model", "nested", "around_multipose")
    }


def test_number_of_collectives_does_not_depend_on_the_number_of_poses() -> None:
    for counts in run_on_ranks(count_all_collectives):
        assert len(counts) == 3
        for few, many in counts.values():
            assert 0 < few == many


def count_backwards(rank: int) -> tuple[int, int]:
    """Run a group in which one pose has a weight on rank 0, and three have one on rank 1."""
    scorer = nested(new_model(), combination=lambda predictions, weights: (predictions.flatten() * weights).sum())
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0] if rank == 0 else [1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    poses = groups_of(0, 1, 4)[0]
    scorer.audit = False
    with log_messages() as messages:
        scorer(poses, weights=weights).combined.backward()
    assert messages.count("resharded the parameters of 3 FSDP2 modules") == 2  # in the forward and in the backward
    return scorer.report.backwards, scorer.report.skipped


def test_ranks_run_the_same_number_of_backwards() -> None:
    assert run_on_ranks(count_backwards) == [(3, 1), (3, 1)]


def accumulate(rank: int) -> tuple[bool, float]:
    """Run two groups and synchronize the gradients of the second only."""
    model = new_model()
    reference = copy.deepcopy(model)
    scorer: Any = nested(model)
    first, second = groups_of(0, 2, 3), groups_of(1, 2, 4)
    scorer.model.set_requires_gradient_sync(False)
    of_both(scorer(first[rank])).backward()
    without_grad = all(parameter.grad is None for parameter in model.parameters())
    scorer.model.set_requires_gradient_sync(True)
    of_both(scorer(second[rank])).backward()
    for groups in (first, second):
        mean_loss(reference, groups, gradhooks.combinations.Mean()).backward()
    return without_grad, deviation(model, reference)


def test_gradients_accumulate_without_synchronization() -> None:
    for without_grad, error in run_on_ranks(accumulate):
        assert without_grad
        assert error <= 1e-12


class Failing(nn.Module):
    """Raises in call number `fails_at`."""

    def __init__(self, fails_at: int | None) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 1)
        self.fails_at, self.log = fails_at, Unwatched(calls=0)

    def forward(self, pose: Tensor) -> Tensor:
        self.log.calls += 1
        if self.fails_at == self.log.calls:
            raise ValueError("this pose is broken")
        prediction: Tensor = self.readout(pose)
        return prediction


def fail_and_continue(rank: int, fails_at: int) -> float:
    """Let rank 1 fail; return the deviation of the next group from a single process."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    torch.manual_seed(0)
    model: Any = Failing(fails_at if rank == 1 else None).double()
    reference = copy.deepcopy(model)
    reference.fails_at = None
    fully_shard(model)
    scorer = gradhooks.MultiPose(model)
    groups = groups_of(0, 2, 4)
    with pytest.raises(gradhooks.errors.DistributedError, match="rank 1 of 2: ValueError: this pose is broken"):
        of_both(scorer(groups[rank])).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    of_both(scorer(groups[rank])).backward()
    mean_loss(reference, groups, gradhooks.combinations.Mean()).backward()
    return deviation(model, reference)


def fail_in_each_pass(rank: int) -> dict[str, float]:
    return {step: fail_and_continue(rank, fails_at) for step, fails_at in {"forward": 3, "second run": 9}.items()}


def test_a_failing_rank_stops_all_ranks_and_leaves_grad_unchanged() -> None:
    for errors in run_on_ranks(fail_in_each_pass):
        assert len(errors) == 2
        assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


def run_stream(group: list[Tensor]) -> None:
    nested(new_model(), accumulator="stream")(group)


def run_pose_parallel(group: list[Tensor]) -> None:
    nested(new_model(), process_group=dist.group.WORLD)(group)


def run_with_root_outside(group: list[Tensor]) -> None:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    model = new_model()
    fully_shard(model[2])
    scorer = gradhooks.MultiPose(model)
    fully_shard(scorer)
    scorer(group)


REFUSALS = {
    run_stream: "use accumulator='auto' or 'recompute'",
    run_pose_parallel: "MultiPose without process_group",
    run_with_root_outside: r"MultiPose\(fully_shard\(model\)\)",
}


def refuse_all(rank: int) -> dict[str, tuple[str, str]]:
    return {refused.__name__: error_of(refused, groups_of(0, 2, 3)[rank]) for refused in REFUSALS}


def test_unsupported_sharding_is_refused_with_the_remedy() -> None:
    for errors in run_on_ranks(refuse_all):
        for refused, remedy in REFUSALS.items():
            kind, message = errors[refused.__name__]
            assert kind == "DistributedError", message
            assert re.search(remedy, message), message


def predict(rank: int) -> int:
    scorer = nested(new_model())
    with torch.no_grad():
        return len(scorer(groups_of(0, 2, 3)[rank]).per_pose)


def test_ranks_predict_groups_of_different_sizes() -> None:
    assert run_on_ranks(predict) == [3, 5]

"""Parameters spread over ranks: FSDP2 in its arrangements, and tensor parallel, against one process with all poses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import Fault, on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

import gradhooks
from gradhooks.testing import full_graph

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="FSDP2 runs on a CPU from torch 2.7 on, and tensor parallel there as well"
)


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), inner, nn.Sequential(nn.Linear(8, 1), nn.Softplus())).double()


def in_one_piece(model: nn.Sequential, **options: Any) -> gradhooks.MultiPose:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - processes without shards need not import it

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


def around_all(model: nn.Sequential, **options: Any) -> gradhooks.MultiPose:
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
    arrange.__name__: arrange for arrange in (in_one_piece, nested, nested_and_replicated, around_all, tensor_parallel)
}


def groups_of(step: int, ranks: int, size: int) -> list[list[Tensor]]:
    """One for each rank, of different sizes."""
    generator = torch.Generator().manual_seed(step)
    return [list(torch.randn(size + 2 * rank, 4, generator=generator, dtype=torch.float64)) for rank in range(ranks)]


def of_both(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum() + prediction.per_pose.tanh().mean()


def of_combined(prediction: gradhooks.MultiPosePrediction) -> Tensor:
    return prediction.combined.square().sum()


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(rank: int, arrangement: str, loss: Callable[..., Tensor], **options: Any) -> float:
    """The largest deviation of a gradient from that of one process, over three steps."""
    model = new_model()
    reference = copy.deepcopy(model)
    scorer = ARRANGEMENTS[arrangement](model, **options)
    combination = copy.deepcopy(scorer.combination)
    shares_data = arrangement == "tensor_parallel"  # its ranks work on one group
    ranks = 1 if shares_data else dist.get_world_size()
    ours, theirs = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(reference.parameters(), 0.1)
    worst = 0.0
    for step in range(3):
        groups = groups_of(step, ranks, 3)
        theirs.zero_grad()
        if step != 1:  # else gradients are added to those of the first step
            ours.zero_grad()
        else:
            sum((loss(full_graph(reference, poses, combination)) for poses in groups_of(0, ranks, 3)), 0.0).backward()
        loss(scorer(groups[0 if shares_data else rank])).backward()
        sum((loss(full_graph(reference, poses, combination)) for poses in groups), torch.zeros(())).backward()
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert other.grad is not None
            other.grad /= ranks
            worst = max(worst, (whole(one.grad) - other.grad).abs().max().item())
        if step:  # so that the second step adds to gradients of the same weights
            ours.step()
            theirs.step()
    return worst


CASES = {
    "mean": {"combination": "mean"},
    "boltzmann": {"combination": "boltzmann"},
    "sharp": {"combination": gradhooks.combinations.Min(scale=300.0)},
    "recompute in chunks": {
        "combination": "boltzmann",
        "accumulator": "recompute",
        "chunk_size": 2,
        "collate": torch.stack,
    },
    "larger chunks forward": {"combination": "max", "forward_chunk_size": 3, "collate": torch.stack},
}


def every_way(rank: int, arrangements: list[str]) -> dict[str, float]:
    return {
        f"{arrangement} {name} {loss.__name__}": trained(rank, arrangement, loss, **options)
        for arrangement in arrangements
        for name, options in CASES.items()
        for loss in (of_both, of_combined)
    }


@pytest.mark.parametrize(
    ("world_size", "arrangements"),
    [
        (2, ["in_one_piece", "nested", "around_all", "tensor_parallel"]),
        (4, ["nested", "nested_and_replicated"]),
    ],
)
def test_gradients_are_those_of_one_process(world_size: int, arrangements: list[str]) -> None:
    for found in on_ranks(every_way, arrangements, world_size=world_size, timeout=120):
        assert len(found) == len(arrangements) * 2 * len(CASES)
        assert {name: error for name, error in found.items() if not error <= 1e-12} == {}


def collectives(rank: int, arrangement: str, size: int) -> int:
    scorer = ARRANGEMENTS[arrangement](new_model())
    for step in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            of_both(scorer(groups_of(step, 2, size)[rank])).backward()
    return sum(event.count for event in watched.key_averages() if event.key.startswith("gloo:"))


def collectives_by_size(rank: int, arrangement: str) -> list[int]:
    return [collectives(rank, arrangement, size) for size in (3, 20)]


@pytest.mark.parametrize("arrangement", ["in_one_piece", "nested", "around_all"])
def test_the_number_of_collectives_does_not_depend_on_the_number_of_poses(arrangement: str) -> None:
    for few, many in on_ranks(collectives_by_size, arrangement):
        assert 0 < few == many


def backwards(rank: int) -> tuple[int, int]:
    """Of a group in which one pose matters on rank 0, and three on rank 1."""
    scorer = nested(new_model(), combination=lambda predictions, weights: (predictions.flatten() * weights).sum())
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0] if rank == 0 else [1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    poses = groups_of(0, 1, 4)[0]
    scorer(poses, weights=weights).combined.backward()
    return scorer.report.backwards, scorer.report.skipped


def test_ranks_agree_on_the_number_of_backwards() -> None:
    assert on_ranks(backwards) == [(3, 1), (3, 1)]


def without_synchronisation(rank: int) -> tuple[bool, float]:
    """Two groups, of which only the second synchronises."""
    model = new_model()
    reference = copy.deepcopy(model)
    scorer: Any = nested(model)
    first, second = groups_of(0, 2, 3), groups_of(1, 2, 4)
    scorer.model.set_requires_gradient_sync(False)
    of_both(scorer(first[rank])).backward()
    quiet = all(parameter.grad is None for parameter in model.parameters())
    scorer.model.set_requires_gradient_sync(True)
    of_both(scorer(second[rank])).backward()
    for poses in (*first, *second):
        (of_both(full_graph(reference, poses, gradhooks.combinations.Mean())) / 2).backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return quiet, max((whole(one.grad) - whole(other.grad)).abs().max().item() for one, other in pairs)


def test_gradients_accumulate_without_synchronisation() -> None:
    for quiet, error in on_ranks(without_synchronisation):
        assert quiet
        assert error <= 1e-12


class Failing(nn.Module):
    """Fails in a later pose of one rank, in the forward or in the second run."""

    def __init__(self, failing: bool) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 1)
        self.fails_at, self.seen = (2 if failing else None), 0

    def forward(self, pose: Tensor) -> Tensor:
        self.seen += 1
        if self.fails_at == self.seen:
            raise ValueError("this pose is broken")
        prediction: Tensor = self.readout(pose)
        return prediction


def mended(rank: int, fails_at: int) -> float:
    """The deviation from one process after a fault, which every rank has told of."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    torch.manual_seed(0)
    model: Any = Failing(failing=rank == 1).double()
    reference = copy.deepcopy(model)
    reference.fails_at = None
    if rank == 1:
        model.fails_at = fails_at
    fully_shard(model)
    scorer = gradhooks.MultiPose(model)
    groups = groups_of(0, 2, 4)
    with pytest.raises(gradhooks.errors.DistributedError, match="rank 1 of 2: ValueError: this pose is broken"):
        of_both(scorer(groups[rank])).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    of_both(scorer(groups[rank])).backward()
    for poses in groups:
        (of_both(full_graph(reference, poses, gradhooks.combinations.Mean())) / 2).backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max((whole(one.grad) - whole(other.grad)).abs().max().item() for one, other in pairs)


@pytest.mark.parametrize("fails_at", [3, 9], ids=["forward", "second run"])
def test_a_rank_that_fails_stops_all_and_leaves_no_trace(fails_at: int) -> None:
    assert max(on_ranks(mended, fails_at)) <= 1e-12


def refused(rank: int, how: str) -> None:
    groups = groups_of(0, 2, 3)
    if how == "stream":
        nested(new_model(), accumulator="stream")(groups[rank])
    if how == "process_group":
        nested(new_model(), process_group=dist.group.WORLD)(groups[rank])
    if how == "root outside":
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

        model = new_model()
        fully_shard(model[2])
        scorer = gradhooks.MultiPose(model)
        fully_shard(scorer)
        scorer(groups[rank])


@pytest.mark.parametrize(
    ("how", "way_out"),
    [
        ("stream", "use accumulator='auto' or 'recompute'"),
        ("process_group", "MultiPose without process_group"),
        ("root outside", r"MultiPose\(fully_shard\(model\)\)"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(how: str, way_out: str) -> None:
    for fault in on_ranks(refused, how, keep_faults=True):
        assert isinstance(fault, Fault)
        assert fault.kind == "DistributedError"
        pytest.raises(Exception, match=way_out).matches(gradhooks.errors.DistributedError(fault.message))


def predicted(rank: int) -> int:
    scorer = nested(new_model())
    with torch.no_grad():
        return len(scorer(groups_of(0, 2, 3)[rank]).per_pose)


def test_ranks_predict_groups_of_different_sizes() -> None:
    assert on_ranks(predicted) == [3, 5]

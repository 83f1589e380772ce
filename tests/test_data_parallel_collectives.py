"""Collectives of data-parallel training, refused wrappers, and coefficients of predictions that pass through DDP."""

from collections import Counter
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from data_parallel import ACCUMULATORS, SCENARIOS, WIDTH, Normalized, Plain, new_module
from multiprocess import run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import gradhooks
from gradhooks.distributed.validation import refuse_synchronized_modules, synchronizing_modules


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives of all process groups, called from Python or from C++ (as DDP does)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.namespace == "c10d":
            self.names[func._opname] += 1
        return func(*args, **(kwargs or {}))


class Step(NamedTuple):
    """Collectives and DDP buckets of one rank in one step."""

    collectives: Counter[str]
    buckets: int


def run_step(rank: int, name: str, accumulator: str | None, count: int, synchronize: bool) -> Step:
    scenario = SCENARIOS[name]
    module = DistributedDataParallel(new_module(scenario, accumulator), bucket_cap_mb=1e-4)
    buckets = 0

    def average(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        del state
        nonlocal buckets
        buckets += 1
        local = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(local, async_op=True).get_future().then(lambda done: done.value()[0])

    module.register_comm_hook(None, average)
    for poses in (1, 1, count + rank):  # DDP rebuilds its buckets at the second step
        buckets = 0
        groups = [list(torch.randn(poses, WIDTH, dtype=torch.float64)) for _ in range(scenario.groups_per_backward)]
        with CollectiveCounter() as counter, nullcontext() if synchronize else module.no_sync():
            scenario.loss_of(module, groups).backward()
    return Step(counter.names, buckets)


def run_steps(rank: int, name: str, synchronize: bool) -> dict[str, list[Step]]:
    """Run a step with few poses and one with many, for each accumulator and the full graph."""
    return {
        accumulator or "full graph": [run_step(rank, name, accumulator, count, synchronize) for count in (2, 12)]
        for accumulator in (*ACCUMULATORS, None)
    }


@pytest.mark.parametrize(
    ("name", "broadcasts"), [("one group", 0), ("several groups", 0), ("several forwards", 0), ("statistics", 2)]
)
def test_one_all_reduce_per_bucket_and_step(name: str, broadcasts: int) -> None:
    for results in run_on_ranks(run_steps, name, True):
        buckets = {label: few.buckets for label, (few, _) in results.items()}
        assert all(count > 1 for count in buckets.values())
        assert {label: {step.buckets for step in steps} for label, steps in results.items()} == {
            label: {count} for label, count in buckets.items()
        }
        for label, steps in results.items():
            assert [step.collectives for step in steps] == [
                Counter(allreduce_=buckets[label], broadcast_=broadcasts) for _ in steps
            ]
        # Buckets depend on the order in which gradients become available.
        assert abs(buckets["full graph"] - buckets["auto"]) <= 1


@pytest.mark.parametrize("name", [pytest.param("one group", marks=pytest.mark.long), "several forwards"])
def test_no_collectives_under_no_sync(name: str) -> None:
    for results in run_on_ranks(run_steps, name, False):
        assert [step for steps in results.values() for step in steps if step != Step(Counter(), 0)] == []


def refusal_of(model: nn.Module) -> str:
    with pytest.raises(gradhooks.errors.DistributedError) as caught:
        gradhooks.MultiPose(model)([torch.zeros(WIDTH)] * 2)
    return str(caught.value)


def refuse_wrappers(rank: int) -> list[str]:
    del rank
    wrapper = DistributedDataParallel(Plain())
    return [refusal_of(wrapper), refusal_of(nn.Sequential(wrapper))]


def test_distributed_data_parallel_inside_is_refused_on_every_rank() -> None:
    for messages in run_on_ranks(refuse_wrappers):
        for message, where in zip(messages, ["the model", "module '0' of the model"], strict=True):
            assert message.startswith(f"{where} is a DistributedDataParallel, which would synchronize gradients once")
            assert message.endswith("DistributedDataParallel(MultiPose(model))")


def model_with_sync_batch_norm() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Normalized())


def refuse_sync_batch_norm(rank: int) -> str:
    gradhooks.MultiPose(model_with_sync_batch_norm().eval())([torch.arange(4.0)] * 2)
    single = dist.new_group([rank], use_local_synchronization=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Normalized(), single)  # runs on GPUs only
    refuse_synchronized_modules(model, synchronizing_modules(model))
    return refusal_of(model_with_sync_batch_norm())


def test_sync_batch_norm_is_refused_on_several_ranks() -> None:
    gradhooks.MultiPose(model_with_sync_batch_norm())([torch.arange(4.0)] * 2)
    for message in run_on_ranks(refuse_sync_batch_norm):
        assert message.startswith("module 'norm' of the model is a SyncBatchNorm in training mode, which mixes poses")
        assert "use BatchNorm" in message


def test_data_parallel_wrapper_inside_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.DataParallel(nn.Linear(4, 1)))
    with pytest.raises(
        gradhooks.errors.DistributedError, match=r"module '1' of the model is a DataParallel.*wrap the bare"
    ):
        gradhooks.MultiPose(model)([torch.zeros(4)])


def coefficients(rank: int, ddp_options: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return the coefficients of predictions of the wrapped module and of the bare one."""
    bare = gradhooks.MultiPose(Plain(), "boltzmann")
    module = DistributedDataParallel(bare, **ddp_options)
    group = list(torch.randn(3 + rank, WIDTH))
    pairs = []
    for training in (True, True, False):
        with torch.set_grad_enabled(training):
            prediction = module(group)
            pairs.append((prediction.coefficients(), bare(group).coefficients()))
        if training:
            prediction.combined.sum().backward()
    return pairs


@pytest.mark.parametrize("ddp_options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_coefficients_of_a_wrapped_prediction(ddp_options: dict[str, Any]) -> None:
    for pairs in run_on_ranks(coefficients, ddp_options):
        assert len(pairs) == 3
        assert all(torch.equal(actual, expected) for actual, expected in pairs)


def replicate(module: nn.Module) -> nn.Module:
    """Replicate a module as DataParallel does on GPUs."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = replicate(child)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, parameter.clone())
    return replica


def test_data_parallel_around_is_refused() -> None:
    """A replica has tensors in place of parameters, so without refusal only a learnable combination would train."""
    scorer = gradhooks.MultiPose(nn.Linear(4, 1), gradhooks.combinations.Boltzmann(learnable=True))
    for module, poses in ((scorer, [torch.zeros(4)]), (nn.Sequential(scorer), torch.zeros(3, 4))):
        with pytest.raises(
            gradhooks.errors.DistributedError, match=r"inside torch\.nn\.DataParallel.*one process for each"
        ):
            replicate(module)(poses)

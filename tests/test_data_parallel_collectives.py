"""What ranks send each other, what is refused before anything is sent, and what a wrapped prediction still knows."""

from collections import Counter
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from data_parallel import ACCUMULATORS, SCENARIOS, WIDTH, Normalised, Plain, module_of
from multiprocess import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import gradhooks
from gradhooks.distributed.validation import refuse_synchronized_modules


class Collectives(TorchDispatchMode):
    """Counts whatever goes to a process group, called from Python or, as by DDP, from C++."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.namespace == "c10d":
            self.names[func._opname] += 1
        return func(*args, **(kwargs or {}))


class Sent(NamedTuple):
    """By one rank in one step."""

    collectives: Counter[str]
    buckets: int


def sent_in_a_step(rank: int, name: str, accumulator: str | None, count: int, silent: bool) -> Sent:
    scenario = SCENARIOS[name]
    module = DistributedDataParallel(module_of(scenario, accumulator), bucket_cap_mb=1e-4)
    buckets = 0

    def averaged(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        del state
        nonlocal buckets
        buckets += 1
        average = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(average, async_op=True).get_future().then(lambda done: done.value()[0])

    module.register_comm_hook(None, averaged)
    for poses in (1, 1, count + rank):  # DDP makes its buckets anew at the second step
        buckets = 0
        groups = [list(torch.randn(poses, WIDTH, dtype=torch.float64)) for _ in range(scenario.together)]
        with Collectives() as seen, module.no_sync() if silent else nullcontext():
            scenario.loss_of(module, groups).backward()
    return Sent(seen.names, buckets)


def sent(rank: int, name: str, silent: bool) -> dict[str, list[Sent]]:
    """By each accumulator, and by the full graph, with few poses and with many."""
    return {
        accumulator or "full graph": [sent_in_a_step(rank, name, accumulator, count, silent) for count in (2, 50)]
        for accumulator in (*ACCUMULATORS, None)
    }


@pytest.mark.parametrize(
    ("name", "broadcasts"), [("one group", 0), ("several groups", 0), ("several forwards", 0), ("statistics", 2)]
)
def test_one_all_reduce_for_each_bucket_and_step(name: str, broadcasts: int) -> None:
    for found in on_ranks(sent, name, False):
        buckets = {who: some.buckets for who, (some, _) in found.items()}
        assert all(count > 1 for count in buckets.values())
        assert {who: {step.buckets for step in steps} for who, steps in found.items()} == {
            who: {count} for who, count in buckets.items()
        }
        for who, steps in found.items():
            assert [step.collectives for step in steps] == [
                Counter(allreduce_=buckets[who], broadcast_=broadcasts) for _ in steps
            ]
        # The order in which gradients come decides which of them share a bucket.
        assert abs(buckets["full graph"] - buckets["auto"]) <= 1


@pytest.mark.parametrize("name", ["one group", "several forwards"])
def test_nothing_is_sent_without_sync(name: str) -> None:
    for found in on_ranks(sent, name, True):
        assert [step for steps in found.values() for step in steps if step != Sent(Counter(), 0)] == []


def refused(model: nn.Module) -> str:
    with pytest.raises(gradhooks.errors.DistributedError) as caught:
        gradhooks.MultiPose(model)([torch.zeros(WIDTH)] * 2)
    return str(caught.value)


def refused_wrappers(rank: int) -> list[str]:
    del rank
    wrapper = DistributedDataParallel(Plain())
    return [refused(wrapper), refused(nn.Sequential(wrapper))]


def test_a_data_parallel_model_inside_is_refused_on_every_rank() -> None:
    for found in on_ranks(refused_wrappers):
        for message, where in zip(found, ["the model", "module '0' of the model"], strict=True):
            assert message.startswith(f"{where} is a DistributedDataParallel, which would synchronise gradients once")
            assert message.endswith("DistributedDataParallel(MultiPose(model))")


def synchronised_norm() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Normalised())


def refused_norm(rank: int) -> str:
    gradhooks.MultiPose(synchronised_norm().eval())([torch.arange(4.0)] * 2)
    alone = dist.new_group([rank], use_local_synchronization=True)
    refuse_synchronized_modules(nn.SyncBatchNorm.convert_sync_batchnorm(Normalised(), alone))  # runs on GPUs only
    return refused(synchronised_norm())


def test_normalisation_over_ranks_is_refused_where_there_are_some() -> None:
    gradhooks.MultiPose(synchronised_norm())([torch.arange(4.0)] * 2)
    for message in on_ranks(refused_norm):
        assert message.startswith("module 'norm' of the model is a SyncBatchNorm, through which gradients")


def test_a_wrapper_inside_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.DataParallel(nn.Linear(4, 1)))
    with pytest.raises(
        gradhooks.errors.DistributedError, match=r"module '1' of the model is a DataParallel.*wrap the bare"
    ):
        gradhooks.MultiPose(model)([torch.zeros(4)])


def known_weights(rank: int, mode: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Of predictions of the wrapped module and of the bare one."""
    bare = gradhooks.MultiPose(Plain(), "boltzmann")
    module = DistributedDataParallel(bare, **mode)
    group = list(torch.randn(3 + rank, WIDTH))
    found = []
    for training in (True, True, False):
        with torch.set_grad_enabled(training):
            prediction = module(group)
            found.append((prediction.coefficients(), bare(group).coefficients()))
        if training:
            prediction.combined.sum().backward()
    return found


@pytest.mark.parametrize("mode", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_a_wrapped_prediction_knows_its_weights(mode: dict[str, Any]) -> None:
    for found in on_ranks(known_weights, mode):
        assert len(found) == 3
        assert all(torch.equal(weights, expected) for weights, expected in found)


def replicated(module: nn.Module) -> nn.Module:
    """As DataParallel does it, where there are GPUs."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = replicated(child)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, parameter.clone())
    return replica


def test_a_data_parallel_wrapper_around_is_refused() -> None:
    """A replica's weights are no parameters: only what the combination has to train would be."""
    scorer = gradhooks.MultiPose(nn.Linear(4, 1), gradhooks.combinations.Boltzmann(learnable=True))
    for module, poses in ((scorer, [torch.zeros(4)]), (nn.Sequential(scorer), torch.zeros(3, 4))):
        with pytest.raises(
            gradhooks.errors.DistributedError, match=r"inside torch\.nn\.DataParallel.*one process for each"
        ):
            replicated(module)(poses)

"""Ranks of a process group that differ: every rank raises the same error, which names the ranks and the difference."""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import error_of, run_on_ranks
from torch import Tensor, nn

import gradhooks
from gradhooks import MultiPose
from gradhooks.combinations import Boltzmann, Min
from gradhooks.distributed.agreement import Agreement
from gradhooks.distributed.combination_description import describe_function
from gradhooks.distributed.parameter_description import value_hashes
from gradhooks.testing import full_graph


def new_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def shared(model: nn.Module, combination: Any = "mean", **options: Any) -> MultiPose:
    return MultiPose(model, combination, process_group=dist.group.WORLD, **options)


def poses_of(seed: int) -> list[Tensor]:
    return list(torch.randn(3 + seed % 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def train(scorer: MultiPose, rank: int, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(scorer.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        scorer(poses_of(10 * step + rank)).combined.square().sum().backward()
        optimizer.step()


def other_weights(rank: int) -> None:
    model = new_model()
    if rank:
        nn.init.normal_(model[2].weight)
    train(shared(model), rank)


def one_other_weight(rank: int) -> None:
    model = new_model()
    with torch.no_grad():
        model[0].weight[3, 2] += 1e-9 * rank
    train(shared(model), rank)


def other_frozen_weights(rank: int) -> None:
    model = new_model()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].bias[:2] = model[0].bias[:2].flip(0) if rank else model[0].bias[:2]
    train(shared(model), rank)


def transposed(rank: int) -> None:
    torch.manual_seed(0)
    sizes = [(4, 6), (6, 4)][rank]
    model = nn.Linear(*sizes).double()
    train(shared(model, call=lambda model, pose: (model.weight.sum() * pose.sum()).view(1)), rank)


def other_dtype(rank: int) -> None:
    model = new_model()
    if rank:
        model[2].float()
    train(shared(model, call=lambda model, pose: model[0](pose).sum().view(1)), rank)


def frozen_on_one_rank(rank: int) -> None:
    model = new_model()
    model[0].bias.requires_grad_(rank == 0)
    train(shared(model), rank)


def frozen_later(rank: int) -> None:
    scorer = shared(new_model())
    train(scorer, rank, steps=2)
    scorer.model[2].bias.requires_grad_(rank == 0)
    train(scorer, rank)


def another_layer(rank: int) -> None:
    model = new_model()
    if rank:
        model.append(nn.Linear(1, 1).double())
    train(shared(model), rank)


def weights_changed_later(rank: int) -> None:
    scorer = shared(new_model())
    train(scorer, rank, steps=2)
    if rank:
        scorer.load_state_dict({name: value * 1.01 for name, value in scorer.state_dict().items()})
    train(scorer, rank)


def other_combination(rank: int) -> None:
    train(shared(new_model(), ["min", "max"][rank]), rank)


def other_option_of_the_combination(rank: int) -> None:
    train(shared(new_model(), Min(scale=1.0 + rank)), rank)


def other_learned_temperature(rank: int) -> None:
    train(shared(new_model(), Boltzmann(1.0 + rank, learnable=True)), rank)


def other_function(rank: int) -> None:
    functions: list[Callable[[Tensor], Tensor]] = [lambda values: values.sum(0), lambda values: values.mean(0)]
    train(shared(new_model(), functions[rank]), rank)


def other_tolerance(rank: int) -> None:
    train(shared(new_model(), tolerance=0.5 if rank else None), rank)


def other_mode(rank: int) -> None:
    model = new_model()
    model[1].train(rank == 0)
    train(shared(model), rank)


def no_grad_on_one_rank(rank: int) -> None:
    scorer = shared(new_model())
    with torch.no_grad() if rank else nullcontext():
        scorer(poses_of(rank))


def autocast_on_one_rank(rank: int) -> None:
    with torch.autocast("cpu", enabled=rank == 1):
        train(shared(new_model()), rank)


def crossed_scorers(rank: int) -> None:
    scorers = [shared(new_model()), shared(new_model())]
    for scorer in scorers if rank else reversed(scorers):
        train(scorer, rank)


def crossed_backwards(rank: int) -> None:
    scorer = shared(new_model())
    losses = [scorer(poses_of(10 + rank)).combined.sum(), scorer(poses_of(20 + rank)).combined.sum()]
    for loss in losses if rank else reversed(losses):
        loss.backward()


def loss_raises_on_one_rank(rank: int) -> None:
    scorer = shared(new_model())
    for batch in range(2):
        loss = scorer(poses_of(10 * batch + rank)).combined.sum()
        if not (rank and batch == 0):  # rank 1 has caught an error in its loss, and goes on with the next batch
            loss.backward()


def combination_raises_on_one_rank(rank: int) -> None:
    def combination(predictions: Tensor, limit: int) -> Tensor:
        if limit:
            raise ValueError("this rank has a limit")
        return predictions.sum(0)

    scorer = shared(new_model(), combination)
    for batch in range(2):
        try:
            loss = scorer(poses_of(10 * batch + rank), limit=rank * (batch == 0)).combined.sum()
        except ValueError:
            continue
        loss.backward()


CASES: dict[Callable[[int], None], str] = {
    other_weights: r"the values of parameter '2.weight'\. rank 0: hash \w+, norm .*; rank 1: hash \w+, norm",
    one_other_weight: r"the values of parameter '0.weight'\. rank 0: .*broadcast",
    other_frozen_weights: r"the values of parameter '0.bias'",
    transposed: r"parameter 'weight'\. rank 0: shape \(6, 4\).*; rank 1: shape \(4, 6\)",
    other_dtype: r"parameter '2.weight'\. rank 0: .*float64.*rank 1: .*float32",
    frozen_on_one_rank: r"parameter '0.bias'\. rank 0: .*trainable; rank 1: .*frozen",
    frozen_later: r"parameter '2.bias'\. rank 0: .*trainable; rank 1: .*frozen",
    another_layer: r"module '3'\. rank 0: does not exist; rank 1: training",
    weights_changed_later: "the values of parameter '0.weight'",
    other_combination: r"the combination\. rank 0: .*Min.*; rank 1: .*Max",
    other_option_of_the_combination: r"the combination\. rank 0: .*'scale': '1\.0'.*rank 1: .*'scale': '2\.0'",
    other_learned_temperature: r"the values of parameter 'combination\.log_temperature'",
    other_function: r"the combination\. rank 0: .*sum.*rank 1: .*mean",
    other_tolerance: r"tolerance=\. rank 0: None; rank 1: 0\.5",
    other_mode: r"the mode of module '1'\. rank 0: training; rank 1: evaluation",
    no_grad_on_one_rank: r"grad mode\. rank 0: on; rank 1: off",
    autocast_on_one_rank: r"autocast\. rank 0: off; rank 1: .*bfloat16",
    crossed_scorers: r"rank 0 is in the reading of the poses of batch 0 of scorer (\d+); rank 1 is in .* of scorer ",
    crossed_backwards: r"rank 0 is in the backward of batch 1 .*rank 1 is in the backward of batch 0",
    loss_raises_on_one_rank: r"rank 0 is in the backward of batch 0 .*rank 1 is in the reading of the poses of batch 1",
    combination_raises_on_one_rank: "rank 0 is in the backward of batch 0 .*rank 1 is in the reading .* of batch 1",
}


def run_cases(rank: int) -> tuple[dict[str, tuple[str, str]], float]:
    """Return the error of each case, and the deviation of a healthy batch of a scorer that was made before them."""
    healthy, reference = shared(new_model()), new_model()
    train(healthy, rank)
    errors = {case.__name__: error_of(case, rank) for case in CASES}
    healthy.load_state_dict(reference.state_dict())
    healthy.zero_grad()
    healthy(poses_of(rank)).combined.square().sum().backward()
    poses = [pose for each in range(2) for pose in poses_of(each)]
    full_graph(reference, poses, gradhooks.combinations.Mean()).combined.square().sum().backward()
    pairs = zip(healthy.model.parameters(), reference.parameters(), strict=True)
    return errors, max(float((one.grad - other.grad).abs().max()) for one, other in pairs)


def test_ranks_that_differ_are_refused_on_every_rank_and_can_go_on() -> None:
    results = run_on_ranks(run_cases)
    assert results[0][0] == results[1][0]
    for errors, deviation in results:
        assert deviation <= 1e-12
        for case, message in CASES.items():
            kind, found = errors[case.__name__]
            assert (case.__name__, kind) == (case.__name__, "DistributedError")
            assert re.search(message, found), f"{case.__name__}: {found}"


def agree(rank: int) -> list[str]:
    """Do what may differ: buffers, copies on one rank, other scorers without the group, counts of poses."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    scorer = shared(model, lambda values, scale: values.sum(0) * scale, chunk_size=3)
    copies = [copy.deepcopy(scorer), MultiPose(model)] if rank else []
    model[1].running_mean.fill_(rank)
    other = shared(new_model())
    for step in range(3):
        if step == 2 and rank:  # moved to another device and back
            other.model[0].weight.data = other.model[0].weight.detach().clone()
        scorer(torch.randn(6 * (step + rank), 4).double(), scale=2.0).combined.sum().backward()
        train(other, rank)
    with torch.no_grad():
        other.model[0].weight[0, :2] = torch.tensor([float("nan"), float("inf")])
    other(poses_of(rank)).combined.sum().backward()
    return [type(each).__name__ for each in copies]


def test_what_may_differ() -> None:
    assert run_on_ranks(agree) == [[], ["MultiPose", "MultiPose"]]


def combinations_to_describe() -> Iterator[object]:
    def scaled(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda predictions: predictions.sum(0) * scale

    yield from (None, Boltzmann(1.0), Boltzmann(2.0), Min(1.0), Min(1.0, normalize=True), scaled(1.0), scaled(2.0))
    yield from (functools.partial(torch.sum, dim=0), functools.partial(torch.sum, dim=1), "a".join, nn.Linear(2, 1))


def test_descriptions_of_combinations() -> None:
    described = [describe_function(each) for each in combinations_to_describe()]
    assert described == [describe_function(each) for each in combinations_to_describe()]
    assert len(set(described)) == len(described)
    assert not any("0x" in each for each in described)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex128, torch.bool, torch.uint8])
def test_hashes_of_values(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).remainder(5).to(dtype)
    swapped = tensor.flip(1)
    hashes = value_hashes(
        [("one", tensor), ("same", tensor.clone()), ("swapped", swapped), ("lazy", nn.LazyLinear(1).weight)]
    )
    assert hashes["one"] == hashes["same"] != hashes["swapped"]
    assert "lazy" not in hashes


def test_one_process_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is compared in a single process")

    monkeypatch.setattr("gradhooks.engine.batch_setup.Subject", refuse)
    monkeypatch.setattr(Agreement, "summary", refuse)
    for memory in (0, "1GiB"):
        scorer = MultiPose(new_model(), memory=memory)
        scorer(poses_of(0)).combined.sum().backward()
        assert isinstance(scorer._agreement, Agreement)
        assert scorer._agreement.call.batch == 0

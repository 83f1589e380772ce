"""Contrastive losses on embeddings: one and two encoders, hard negatives, ranks, precision, memory."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.distributed as dist
from embedding_models import encoder, in_chunks, info_nce, inputs, pad, sequences, token_encoder
from multiprocess import run_on_ranks
from seeding import manual_seed
from torch import Tensor, nn

import gradhooks
from gradhooks.profiling.peak_memory import peak_bytes

CHUNK = 8
CPU = torch.device("cpu")


def gradients(*models: nn.Module) -> list[Tensor]:
    return [leaf.grad for model in models for leaf in model.parameters() if leaf.grad is not None]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-10 * (other.norm() + 1e-3)  # the bias of keys has no gradient


def wrap(model: nn.Module, **options: object) -> gradhooks.MultiPose:
    return gradhooks.MultiPose(model, None, **{"chunk_size": CHUNK, "memory": 0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [64, 1024])
@pytest.mark.parametrize("encoders", [1, 2])
def test_in_batch_and_hard_negatives(count: int, encoders: int) -> None:
    queries, passages = inputs(count, 1), inputs(count + count // 4, 2)  # the last quarter are hard negatives
    models = [encoder(seed) for seed in range(encoders)]
    manual_seed(3)
    info_nce(in_chunks(models[0], queries, CHUNK), in_chunks(models[-1], passages, CHUNK)).backward()
    expected = gradients(*models)
    for options, recomputed in (({}, len(passages)), ({"memory": "1GiB"}, 0)):
        models = [encoder(seed) for seed in range(encoders)]
        scorers = [wrap(model, **options) for model in models]
        manual_seed(3)
        loss = info_nce(scorers[0](queries).per_pose, scorers[-1](passages).per_pose)
        loss.backward()
        assert_close(gradients(*models), expected)
        assert scorers[-1].report.recomputed == recomputed


def test_one_call_for_both_sides() -> None:
    queries, passages = inputs(24, 1), inputs(24, 2)
    model = encoder()
    manual_seed(3)
    info_nce(*in_chunks(model, torch.cat([queries, passages]), CHUNK).chunk(2)).backward()
    expected = gradients(model)
    model = encoder()
    manual_seed(3)
    info_nce(*wrap(model)(torch.cat([queries, passages])).per_pose.chunk(2)).backward()
    assert_close(gradients(model), expected)


COUNTS = (12, 20)


def rank_errors(rank: int, _: None) -> list[float]:
    """Return the errors of InfoNCE over the pairs of all ranks."""
    queries, passages = (torch.cat([inputs(n, seed + r) for r, n in enumerate(COUNTS)]) for seed in (10, 20))
    errors = []
    for encoders in (1, 2):
        models = [encoder(seed) for seed in range(encoders)]
        sides: list[list[Tensor]] = [[], []]
        for r, count in enumerate(COUNTS):  # every rank has random numbers of its own
            manual_seed(100 + r)
            own = slice(sum(COUNTS[:r]), sum(COUNTS[:r]) + count)
            sides[0].append(in_chunks(models[0], queries[own], CHUNK))
            sides[1].append(in_chunks(models[-1], passages[own], CHUNK))
        info_nce(*map(torch.cat, sides)).backward()
        expected = gradients(*models)
        models = [encoder(seed) for seed in range(encoders)]
        scorers = [wrap(model, process_group=dist.group.WORLD) for model in models]
        own = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
        manual_seed(100 + rank)
        info_nce(scorers[0](queries[own]).per_pose, scorers[-1](passages[own]).per_pose).backward()
        pairs = zip(gradients(*models), expected, strict=True)
        errors += [((one - other).norm() / other.norm()).item() for one, other in pairs]
    return errors


def test_negatives_of_all_ranks() -> None:
    for errors in run_on_ranks(rank_errors, None, world_size=2):
        assert max(errors) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_scaler(dtype: torch.dtype) -> None:
    both = inputs(32, 1).float(), inputs(32, 2).float()
    found = []
    for wrapped in (False, True):
        model = encoder().float()
        scorer = wrap(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype is torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        manual_seed(3)
        with torch.autocast("cpu", dtype, cache_enabled=False):
            sides = [scorer(side).per_pose if wrapped else in_chunks(model, side, CHUNK) for side in both]
            loss = info_nce(*sides)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer) if scaler.is_enabled() else None
        found.append(gradients(model))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()


def test_copies_of_the_embeddings() -> None:
    """In the second run a step keeps their coefficients only."""
    count, width = 1024, 256
    model = nn.Sequential(nn.Linear(4, 16 * width), nn.Tanh(), nn.Linear(16 * width, width))
    poses, target = torch.randn(count, 4), torch.randn(count, width)
    scorer = wrap(model, chunk_size=32)

    def step(embed: object) -> None:
        model.zero_grad()
        (embed(poses) * target).sum().backward()  # type: ignore[operator]

    def two_passes() -> None:  # of GradCache
        model.zero_grad()
        with torch.no_grad():
            cached = in_chunks(model, poses, 32).requires_grad_()
        (cached * target).sum().backward()
        for part, gradient in zip(poses.split(32), cached.grad.split(32), strict=True):
            torch.autograd.backward(model(part), gradient)

    scored = partial(step, lambda poses: scorer(poses).per_pose)
    scored()
    twice, ours = (peak_bytes(each, CPU) / (4 * count * width) for each in (two_passes, scored))
    assert ours < twice - 0.9  # which keeps the embeddings beside their coefficients


def test_embeddings_that_are_changed_in_place() -> None:
    """They share the memory of those with which the second run is compared."""
    poses = inputs(20, 1)
    found = []
    for wrapped in (False, True):
        model = encoder()
        manual_seed(3)
        embeddings = wrap(model)(poses).per_pose if wrapped else in_chunks(model, poses, CHUNK)
        embeddings.mul_(2).tanh_()
        embeddings.square().sum().backward(retain_graph=True)
        embeddings.sum().backward()
        found.append(gradients(model))
    assert_close(*found)


# -- lengths --------------------------------------------------------------------------------------------------------

LENGTHS = sorted([5, 9, 12, 16] * 12 + [60, 64, 90, 96])


def test_chunks_follow_the_lengths_of_their_sequences() -> None:
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0))
    poses = sequences(LENGTHS[index] for index in order)
    by_length = sorted(range(len(poses)), key=lambda index: len(poses[index]))
    restored = torch.tensor(by_length).argsort()
    target = torch.randn(len(poses), 4, dtype=torch.float64)

    def loss(embeddings: Tensor) -> Tensor:
        return (embeddings.softmax(0) * target).sum()

    native = token_encoder()
    loss(torch.cat([native(pose[None]) for pose in poses])).backward()
    model = token_encoder()
    longest = poses[by_length[-1]][None]
    one_step = peak_bytes(lambda: model(longest).sum().backward(), CPU)
    budget = one_step
    sizes: list[tuple[int, ...]] = []

    def call(model: nn.Module, ids: Tensor) -> Tensor:
        sizes.append(tuple(ids.shape))
        return model(ids)

    options = {"memory": budget, "chunk_size": None, "collate": pad, "accumulator": "recompute", "call": call}
    scorer = wrap(model, **options)

    def step() -> None:
        model.zero_grad()
        sizes.clear()
        loss(scorer([poses[index] for index in by_length]).per_pose[restored]).backward()

    step()  # measures
    step()
    assert_close(gradients(model), gradients(native))
    assert peak_bytes(step, CPU) <= budget + 1.1 * one_step
    first, second = sizes[: scorer.report.chunks], sizes[scorer.report.chunks :]
    assert second == first[::-1]  # the same boundaries
    assert max(rows for rows, _ in first) >= 8 * min(rows for rows, length in first if length > 60)  # rows x longest
    assert len(first) < len(poses) / 3
    assert sum(rows for rows, _ in first) == len(poses)

"""Poses that are read while they run: datasets and loaders give the gradients of the same poses in a list."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from seeding import manual_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import gradhooks
from gradhooks.errors import PosesError, ReplayError

COUNT, CHUNK = 10, 4
ROWS = torch.randn(COUNT, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Rows(Dataset[Tensor]):
    """Rows of a tensor, each of them changed by `augment` when it is read."""

    def __init__(self, events: list[str], augment: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.events = events
        self.augment = augment

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        self.events.append(f"read {index}")
        return self.augment(ROWS[index])


class SeveralRows(Rows):
    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self[index] for index in indices]


class ByKey:
    """Is read by iteration: it is indexed by key, as a Series of pandas is."""

    def keys(self) -> list[int]:
        return [COUNT - 1 - index for index in range(COUNT)]

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[Tensor]:
        return iter(ROWS)

    def __getitem__(self, key: int) -> Tensor:
        return ROWS[COUNT - 1 - key]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2)).double()

    def forward(self, poses: Tensor) -> Tensor:
        return self.net(poses)


FORMS: dict[str, Callable[[list[str]], Any]] = {
    "dataset": Rows,
    "dataset that reads several": SeveralRows,
    "loader": lambda events: DataLoader(Rows(events), batch_size=None),
    "loader with an order": lambda events: DataLoader(Rows(events), batch_size=None, sampler=range(COUNT)),
    "loader with workers": lambda events: DataLoader(Rows(events), batch_size=None, num_workers=1),
    "loader with workers and a sampler": lambda events: DataLoader(
        Rows(events), batch_size=None, num_workers=1, sampler=iter_once(range(COUNT))
    ),
    "shuffled loader": lambda events: DataLoader(Rows(events), batch_size=None, sampler=iter_once(range(COUNT))),
    "object with keys": lambda events: ByKey(),  # noqa: ARG005
    "list": lambda events: list(ROWS),  # noqa: ARG005
}


class iter_once(torch.utils.data.Sampler[int]):  # noqa: N801 - reads like a function
    """A sampler of unknown order, so that a pose cannot be read again by its index."""

    def __init__(self, indices: range) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def recording(events: list[str]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return a `call` that records when the model runs; a list in the model would be restored after a second run."""

    def call(model: nn.Module, poses: Tensor) -> Tensor:
        events.append("run")
        return model(poses)

    return call


def native_step(poses: Any) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the full graph in the same chunks, and the state of the generator after it."""
    manual_seed(1)
    model = Encoder()
    manual_seed(2)
    read = iter(poses)
    starts = range(0, COUNT, CHUNK)
    rows = [model(torch.stack([next(read) for _ in range(min(CHUNK, COUNT - start))])) for start in starts]
    torch.cat(rows).logsumexp(0).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()], torch.get_rng_state()


def step(make: Callable[[list[str]], Any], **options: Any) -> tuple[list[Tensor], Tensor, list[str], Any]:
    manual_seed(1)
    events: list[str] = []
    model = Encoder()
    scorer = gradhooks.MultiPose(model, None, collate=torch.stack, chunk_size=CHUNK, call=recording(events), **options)
    poses = make(events)
    manual_seed(2)
    predictions = scorer(poses).per_pose
    state = torch.get_rng_state()
    predictions.logsumexp(0).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()], state, events, scorer.report


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_a_list(form: str) -> None:
    native_poses = FORMS[form]([])
    expected, expected_state = native_step(native_poses)
    for options in ({"memory": 0}, {"accumulator": "recompute"}, {}):
        gradients, state, events, report = step(FORMS[form], audit=False, **options)
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(state, expected_state), options
        assert report.recomputed == (0 if not options else COUNT)
        if form.startswith("dataset"):  # in chunks, as they run; in the second run last to first
            first = [*(f"read {index}" for index in range(CHUNK)), "run", f"read {CHUNK}"]
            assert events[: len(first)] == first
            assert events.count("read 0") == (1 if not options else 2)


def test_without_gradients_each_pose_is_read_once() -> None:
    events: list[str] = []
    scorer = gradhooks.MultiPose(
        Encoder().eval(), "mean", collate=torch.stack, chunk_size=CHUNK, call=recording(events)
    )
    with torch.no_grad():
        predictions = scorer(Rows(events)).per_pose
    torch.testing.assert_close(predictions, scorer.model(ROWS), rtol=1e-12, atol=1e-12)
    assert events[CHUNK] == "run"  # reading and running alternate
    assert sorted(event for event in events if event != "run") == [f"read {index}" for index in range(COUNT)]


def test_groups_of_a_dataset() -> None:
    groups = torch.arange(COUNT) % 3
    model = Encoder().eval()
    scorer = gradhooks.MultiPose(model, "max", memory=0, collate=torch.stack, chunk_size=CHUNK)
    scorer(gradhooks.Groups(Rows([]), groups)).combined.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    scorer(list(ROWS), groups=groups).combined.sum().backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"memory": 0}, {"accumulator": "stream"}, {}])
def test_a_generator_with_groups_is_read_chunk_by_chunk(options: dict[str, Any]) -> None:
    groups = torch.arange(COUNT) % 3

    def run(poses: Any, events: list[str]) -> list[Tensor]:
        model = Encoder()
        model.net[-1] = nn.Linear(5, 1, dtype=torch.float64)
        call = recording(events)
        scorer = gradhooks.MultiPose(
            model, "mean", collate=torch.stack, chunk_size=CHUNK, call=call, audit=False, **options
        )
        for _ in range(2):  # the first batch measures
            events.clear()
            scorer(poses(), groups=groups).combined.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    def generate(augment: Callable[[Tensor], Tensor] = torch.clone) -> Callable[[], Iterator[Tensor]]:
        dataset = Rows(events, augment)
        return lambda: (dataset[index] for index in range(COUNT))

    events: list[str] = []
    found = []
    for poses in (lambda: list(ROWS), generate()):
        manual_seed(1)
        found.append(run(poses, events))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    reads = [f"read {index}" for index in range(COUNT)]
    first = [*reads[:4], "run", *reads[4:8], "run", *reads[8:], "run"]
    assert [event for event in events if event != "run"] == reads  # each once
    assert events[: len(first)] == first or options == {"accumulator": "stream"}
    augment = generate(lambda row: row + torch.randn(3, dtype=torch.float64))
    found = []
    for poses in (lambda: list(augment()), augment):  # draws random numbers: is read as a list
        manual_seed(1)
        found.append(run(poses, events))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_generator_with_groups_of_poses_that_require_grad() -> None:
    poses, groups = ROWS.clone().requires_grad_(), [0] * COUNT
    scorer = gradhooks.MultiPose(Encoder(), "mean", memory=0)
    scorer((pose for pose in poses), groups=groups).per_pose.square().sum().backward()
    assert poses.grad is not None
    assert bool(poses.grad.abs().sum(1).all())


def test_a_generator_of_another_length_than_its_groups() -> None:
    scorer = gradhooks.MultiPose(Encoder(), "mean", memory=0)
    for count, message in (
        (11, "ended after 10 of the 11 poses that have a group"),
        (9, "more than the 9 poses"),
    ):
        with pytest.raises(PosesError, match=message):
            scorer((row for row in ROWS), groups=[0] * count)


class InWorker(Rows):
    """Says beside each row whether a worker read it."""

    def __getitem__(self, index: int) -> Any:
        return ROWS[index], torch.utils.data.get_worker_info() is not None


@pytest.mark.parametrize("batch_size", [None, 2])
def test_workers_read_in_both_runs(batch_size: int | None) -> None:
    seen: list[bool] = []

    def collate(poses: list[tuple[Tensor, Any]]) -> Tensor:
        seen.extend(bool(torch.as_tensor(worker).all()) for _, worker in poses)
        return torch.stack([row if batch_size is None else row.mean(0) for row, _ in poses])

    loader = DataLoader(InWorker([]), batch_size=batch_size, num_workers=2)
    count = len(loader)
    gradients = []
    for poses in (list(loader), loader):
        manual_seed(1)
        model = Encoder().eval()  # the loader draws a seed for its workers
        scorer = gradhooks.MultiPose(model, None, collate=collate, chunk_size=2, memory=0, audit=False)
        seen.clear()
        predictions = scorer(poses).per_pose
        assert seen == [True] * count
        predictions.square().sum().backward(retain_graph=True)
        assert seen == [True] * count * 2
        predictions[:3].sum().backward()  # only some poses run again, in other chunks: without workers
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_draws_from_the_default_generator_are_repeated() -> None:
    def augment(row: Tensor) -> Tensor:
        return row + torch.randn(3, dtype=torch.float64)

    expected, _ = native_step(Rows([], augment))
    for options in ({"memory": 0}, {}):
        gradients, *_ = step(lambda events: Rows(events, augment), **options)
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pose_that_is_another_one_when_it_is_read_again_is_refused(workers: int) -> None:
    generator = torch.Generator()

    def augment(row: Tensor) -> Tensor:
        return row + torch.randn(3, dtype=torch.float64, generator=generator)

    match = "the pose is another one each time it is read: pose differ. poses.i. must be deterministic"
    with pytest.raises(ReplayError, match=match):
        step(lambda events: DataLoader(Rows(events, augment), batch_size=None, num_workers=workers), memory=0)


def test_a_pose_that_requires_grad_is_refused_where_it_would_be_read_again() -> None:
    def augment(row: Tensor) -> Tensor:
        return row.clone().requires_grad_()

    step(lambda events: Rows(events, augment))  # all poses run plainly
    with pytest.raises(PosesError, match=r"pose 0: pose requires grad, .* pass list\(poses\)"):
        step(lambda events: Rows(events, augment), memory=0)
    frozen = Encoder().requires_grad_(False)
    with pytest.raises(PosesError, match=r"the prediction of pose 0 requires grad, .* pass list\(poses\)"):
        gradhooks.MultiPose(frozen, memory=0, collate=torch.stack)(Rows([], augment))


def test_a_loader_of_another_length_is_refused() -> None:
    class Wrong(iter_once):
        length = COUNT

        def __len__(self) -> int:
            return self.length

    sampler = Wrong(range(COUNT))
    for length, message in ((COUNT + 1, "poses ended after 10 of the 11 poses"), (9, "more than the 9 poses")):
        sampler.length = length
        with pytest.raises(PosesError, match=message):
            step(lambda events: DataLoader(Rows(events), batch_size=None, num_workers=1, sampler=sampler))


def memory_growth(count: int) -> list[float]:
    """Return by how many poses memory grows, with two workers and without, while `count` poses run twice."""
    script = Path(__file__).parent / "loaded_poses_memory.py"
    command = [sys.executable, str(script), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    return [float(line) for line in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_poses() -> None:
    assert max(memory_growth(600)) < 200


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_ten_thousand_poses_grow_memory_by_less_than_200() -> None:
    assert max(memory_growth(10_000)) < 200

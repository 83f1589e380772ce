"""ModelState: a restored model gives the same predictions again, and is left as it was found."""

import copy
import weakref
from typing import Any

import pytest
import torch
from changing_models import CHANGING, Changing
from chosen_device import needs
from module_contents import contents, seed_everything
from small_model import assert_gradients_close
from torch import Tensor, nn
from unwatched import Unwatched

import gradhooks
from gradhooks.engine.model_state import ModelState
from gradhooks.engine.parameter_values import carry_over_data
from gradhooks.engine.shadow_parameters import ShadowParameters

COUNT = 5
pytestmark = [
    pytest.mark.usefixtures("_on_the_device"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def build(name: str) -> Changing:
    seed_everything(1)
    torch.set_default_dtype(torch.float64)
    try:
        return CHANGING[name]()
    finally:
        torch.set_default_dtype(torch.float32)


def make_poses(count: int = COUNT) -> list[Tensor]:
    return list(torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))


def run_with_snapshots(model: nn.Module, state: ModelState, poses: list[Tensor]) -> tuple[list[Any], list[Tensor]]:
    snapshots, outputs = [], []
    for pose in poses:
        snapshots.append(state.snapshot())
        outputs.append(model(pose).detach())
    return snapshots, outputs


@pytest.mark.parametrize("name", CHANGING)
def test_every_state_is_found_again(name: str) -> None:
    model, poses = build(name), make_poses()
    state = ModelState(model)
    for batch in range(2):  # in the second one it is known what changes
        with torch.no_grad():
            with state.preserved(only_on_error=True) as before:
                snapshots, outputs = run_with_snapshots(model, state, poses)
                assert batch == 1 or not state.unchanged_since(before)
            after = contents(model)
            with state.preserved():
                for index in (4, 3, 0, 1, 2):
                    state.restore(snapshots[index])
                    assert torch.equal(model(poses[index]), outputs[index]), index
            assert contents(model) == after


@pytest.mark.parametrize("name", CHANGING)
def test_the_first_run_leaves_what_plain_forwards_leave(name: str) -> None:
    model, plain = build(name), build(name)
    seed_everything(2)
    for pose in make_poses():
        plain(pose)
    expected = contents(plain)
    seed_everything(2)
    with ModelState(model).preserved(only_on_error=True):
        for pose in make_poses():
            model(pose)
    assert contents(model) == expected


@pytest.mark.parametrize("name", CHANGING)
def test_an_error_in_the_first_forward_leaves_no_trace(name: str) -> None:
    model = build(name)
    before = contents(model)
    with torch.no_grad(), pytest.raises(ZeroDivisionError), ModelState(model).preserved(only_on_error=True):
        fail_after(model)
    assert contents(model) == before


def fail_after(model: nn.Module) -> None:
    model(make_poses()[0])
    raise ZeroDivisionError


def trained(name: str, accumulator: str | None) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """Return contents, gradients and predictions of two steps of the full graph, or of an accumulator."""
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scorer = None if accumulator is None else gradhooks.MultiPose(model, "mean", accumulator=accumulator)
    gradients, predictions = [], []
    seed_everything(3)
    for _ in range(2):
        optimizer.zero_grad()
        if scorer is None:
            per_pose = torch.stack([model(pose) for pose in make_poses()])
            combined = per_pose.mean(0)
        else:
            combined, per_pose = scorer(make_poses())
        (combined.sum() + per_pose.square().sum()).backward()
        gradients += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        predictions.append(per_pose.detach())
        optimizer.step()
    return contents(model), gradients, predictions


REBINDS_WEIGHTS = ["DecayingWeight", "NormOfWeightLimited"]  # needs `carry_over_data`


@pytest.mark.parametrize("name", sorted(set(CHANGING) - set(REBINDS_WEIGHTS)))
def test_recompute_trains_as_the_full_graph(name: str) -> None:
    result, gradients, predictions = trained(name, "recompute")
    expected, expected_gradients, expected_predictions = trained(name, None)
    for one, other in zip(gradients + predictions, expected_gradients + expected_predictions, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    different = [key for key in expected if result.get(key) != expected[key] and "parameter" not in key]
    assert different == []


@pytest.mark.parametrize("name", [*REBINDS_WEIGHTS, "WeightInPlace", "LimitedEmbedding"])
def test_what_a_forward_does_to_shadows_reaches_the_parameters(name: str) -> None:
    """The first run leaves what plain forwards leave, a second run leaves no trace."""
    model, plain, poses = build(name), build(name), make_poses()
    outputs = [plain(pose).detach() for pose in poses]
    shadows, state = ShadowParameters(model), ModelState(model)
    with torch.no_grad(), shadows, state.preserved(only_on_error=True):
        snapshots, first = run_with_snapshots(model, state, poses)
    carry_over_data(shadows.real, shadows.shadows)
    with torch.no_grad(), shadows, state.preserved():
        for snapshot, pose, output in reversed(list(zip(snapshots, poses, first, strict=True))):
            state.restore(snapshot)
            assert torch.equal(model(pose), output)
    assert all(map(torch.equal, first, outputs))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(leaf.is_set_to(real) for leaf, real in zip(shadows.shadows, shadows.real, strict=True))


def test_a_failing_forward_leaves_parameters_and_shadows_together() -> None:
    model = build("DecayingWeight")
    shadows, before = ShadowParameters(model), contents(model)
    with torch.no_grad(), pytest.raises(ZeroDivisionError), shadows, ModelState(model).preserved(only_on_error=True):
        fail_after(model)
    assert contents(model) == before
    assert all(leaf.is_set_to(real) for leaf, real in zip(shadows.shadows, shadows.real, strict=True))


def test_containers_and_buffers_keep_their_identity() -> None:
    model = build("Nested")
    deep, values = model.state["deep"], model.alias.values
    with ModelState(model).preserved():
        model(make_poses()[0])
        model.state["deep"] = []
        model.alias.values = [3]
    assert model.state["deep"] is deep
    assert model.alias is deep[0]
    assert model.alias.values is values
    assert values == []


def test_a_version_counter_does_not_move() -> None:
    """Graphs that saved a buffer stay valid."""
    model = build("HiddenBuffer")
    version = model.average._version
    with ModelState(model).preserved():
        model(make_poses()[0])
    assert model.average._version == version


@pytest.mark.parametrize("start", [3, 8])
@pytest.mark.parametrize("name", ["CountsCalls", "AverageInPlace", "HiddenBuffer", "Queue", "TeacherByData"])
def test_what_begins_to_change_later_is_noticed(name: str, start: int) -> None:
    """In the middle of the first batch, and in the middle of the second one, which then has to start again."""
    if name == "HiddenBuffer" and start > COUNT:
        needs("comparisons of the state in every batch")
    model, poses = build(name), make_poses()
    calls, change, seen = [0], model.change, []

    def later(pose: Tensor) -> Any:
        calls[0] += 1
        return change(pose) if calls[0] > start else 0.0

    object.__setattr__(model, "change", later)
    state = ModelState(model)
    with torch.no_grad():
        for _ in range(2):
            with state.preserved(only_on_error=True) as before:
                first = calls[0]
                snapshots, outputs = run_with_snapshots(model, state, poses)
                seen.append(state.unchanged_since(before))
        calls[0] = first
        assert state.noticed_late == (start > COUNT)
        if start < COUNT:
            for index, (snapshot, output) in enumerate(zip(snapshots, outputs, strict=True)):
                calls[0] = first + index
                state.restore(snapshot)
                assert torch.equal(model(poses[index]), output)
    assert seen == [start > COUNT, False]


class Constant(nn.Module):
    """Holds much and changes nothing; one value is written anew in each forward."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("table", torch.randn(1000, 4))
        self.options, self.names, self.scale = {"depth": [1, 2]}, ["first"], 2.0

    def forward(self, pose: Tensor) -> Tensor:
        self.scale = float(len(pose)) ** 0.5
        return self.net(pose[None])[0] * self.scale + self.table[0].sum()


def test_a_model_that_changes_nothing_shares_one_snapshot() -> None:
    model, poses = Constant().eval(), list(torch.randn(5, 4))
    state = ModelState(model)
    with torch.no_grad(), state.preserved(only_on_error=True) as before:
        snapshots, _ = run_with_snapshots(model, state, poses)
        assert state.unchanged_since(before)
    assert all(snapshot is snapshots[0] for snapshot in snapshots)


def test_changes_between_batches_are_not_those_of_a_forward() -> None:
    """An optimizer, `load_state_dict` or a callback may change everything; then nothing is copied for each chunk."""
    model = Constant().eval()
    state, poses = ModelState(model), list(torch.randn(3, 4))
    for step in range(3):
        with torch.no_grad(), state.preserved(only_on_error=True) as before:
            snapshots, _ = run_with_snapshots(model, state, poses)
            assert state.unchanged_since(before)
        assert all(snapshot is snapshots[0] for snapshot in snapshots)
        with torch.no_grad():
            model.table.add_(1)
            model.names.append("next")
            for parameter in model.parameters():
                parameter.mul_(0.5)
        assert all(copy.value is None for copy in snapshots[0].parameters.copies.values()), step


class LargeBufferInPlace(CHANGING["LargeHiddenBuffer"]):  # type: ignore[misc]
    def change(self, pose: Tensor) -> Any:
        self.average[-1].mul_(0.9).add_(0.1 * pose)
        return self.average[-1].clone()


@pytest.mark.parametrize("kind", [LargeBufferInPlace, CHANGING["LargeHiddenBuffer"]])
def test_a_silent_write_between_batches_is_not_undone(kind: type[Changing]) -> None:
    model, poses = kind().double(), make_poses()
    state = ModelState(model)
    with torch.no_grad():
        for value in (1.0, 2.0):
            with state.preserved(only_on_error=True) as before:
                run_with_snapshots(model, state, poses)
                state.unchanged_since(before)
            model.average.data[100:-1].fill_(value)
            expected = model.average.clone()
            with state.preserved():
                run_with_snapshots(model, state, poses)
            assert torch.equal(model.average, expected)


def test_a_state_that_comes_back_counts_as_changed() -> None:
    model = build("SwitchesMode")
    state = ModelState(model)
    with state.preserved() as before:
        run_with_snapshots(model, state, make_poses(4))
        assert model.dropout.training
        assert not state.unchanged_since(before)


def test_a_graph_in_an_attribute_is_not_kept_alive() -> None:
    model = build("CountsCalls")
    saved = torch.ones(4, dtype=torch.float64)
    alive = weakref.ref(saved)
    model.stashed = model.net.weight * saved
    state = ModelState(model)
    with state.preserved(only_on_error=True):
        state.snapshot()
        snapshots = [state.snapshot()]
        del model.stashed, saved
        assert alive() is None
        state.restore(snapshots[0])
    assert not hasattr(model, "stashed")


def test_a_parameter_that_is_first_changed_later_is_an_error_once() -> None:
    needs("comparisons of the state in every batch")
    model, poses = build("LargeTeacherByData"), make_poses(2)
    state = ModelState(model)
    object.__setattr__(model, "change", lambda _: 0.0)
    with torch.no_grad():
        with state.preserved():
            run_with_snapshots(model, state, poses)
        object.__setattr__(model, "change", lambda _: halve(model.teacher.weight))
        error = pytest.raises(
            gradhooks.errors.ReplayError, match=r"a forward changed teacher\.weight, which no forward"
        )
        with error, state.preserved():
            run_with_snapshots(model, state, poses)
        before = model.teacher.weight.clone()
        with state.preserved():
            run_with_snapshots(model, state, poses)
        assert torch.equal(model.teacher.weight, before)


class LargeWeightInPlace(Changing):
    def prepare(self) -> None:
        self.first = nn.Linear(4, 300, bias=False)

    def change(self, pose: Tensor) -> Any:
        self.first.weight.data[-1].mul_(0.9)
        return self.first(pose)[-1]


def test_large_trainable_parameters_are_copied_on_request() -> None:
    model, poses = LargeWeightInPlace().double(), make_poses()
    state, before = ModelState(model), contents(model)
    with torch.no_grad():
        with state.preserved(probe=True):
            run_with_snapshots(model, state, poses[:1])
        assert contents(model) == before
        with state.preserved():  # it is known now
            snapshots, outputs = run_with_snapshots(model, state, poses)
            for index in reversed(range(COUNT)):
                state.restore(snapshots[index])
                assert torch.equal(model(poses[index]), outputs[index])
        assert contents(model) == before


def halve(weight: Tensor) -> float:
    weight.mul_(0.5)
    return 0.0


class CountsOnRequest(nn.Module):
    """Counts its forwards in an attribute once it is told to, and predicts with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1).double()
        self.told = Unwatched(counts=False)
        self.count = 0

    def forward(self, pose: Tensor) -> Tensor:
        self.count += int(self.told.counts)
        return self.net(pose).tanh() * (1 + self.count)


class LargeStatistics(nn.Module):
    """Writes, without a sign, what its next forward reads, and not in the first bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = torch.jit.script(nn.BatchNorm1d(300)), nn.Linear(300, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.head(self.norm(pose) + self.norm.running_mean).mean(0)


def test_a_silent_write_beyond_the_first_bytes_is_undone_for_the_second_run() -> None:
    model, reference = LargeStatistics().double(), LargeStatistics().double()
    reference.load_state_dict(model.state_dict())
    poses = [torch.randn(4, 300, dtype=torch.float64) * (torch.arange(300) >= 200) for _ in range(3)]
    gradhooks.MultiPose(model, "mean", accumulator="recompute", memory=0)(poses).combined.sum().backward()
    (sum(reference(pose) for pose in poses).sum() / 3).backward()
    assert_gradients_close(model, reference)
    for buffer, expected in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("accumulator", ["stream", "recompute", "store"])
def test_a_batch_in_which_state_begins_to_change_starts_again(accumulator: str) -> None:
    model, poses = CountsOnRequest(), make_poses()
    plain = copy.deepcopy(model)
    scorer = gradhooks.MultiPose(model, "mean", accumulator=accumulator, memory=0)
    for step in range(3):
        model.told.counts = plain.told.counts = step > 0
        model.zero_grad()
        plain.zero_grad()
        scorer(poses).combined.square().sum().backward()
        torch.stack([plain(pose) for pose in poses]).mean(0).square().sum().backward()
        assert model.count == plain.count == step * COUNT
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)

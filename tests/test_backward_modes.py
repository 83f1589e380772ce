"""Groups in a training loop: several at once, in any order, accumulated, clipped, stepped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from model_state import untouched
from model_zoo import Place, Specimen, build
from torch import Tensor, nn
from training_reference import (
    ACCUMULATORS,
    COMBINATIONS,
    LOSSES,
    Gradients,
    assert_same_gradients,
    assert_same_training,
    gradients_of,
    leaves_of,
    of_both,
    of_combined,
    train_by_full_graph,
    train_by_group,
)

from gradhooks import MultiPose, MultiPosePrediction
from gradhooks.testing import full_graph

# Sharp, and of parameters of its own.
COMBINED_BY = ["min of scale 1", "boltzmann learnable"]
# Plain; two outputs that recompute; a graph that begins outside of the model.
MODELS = ["plain_mlp", "tied_weights", "shared_encoder_output"]

Predict = Callable[..., MultiPosePrediction]


class Trainee:
    """A specimen with a combination, predicted by a group or, without an accumulator, by the full graph."""

    def __init__(self, name: str, combination: str, accumulator: str | None, place: Place, **options: Any) -> None:
        self.specimen: Specimen = build(name, place)
        self.combination = COMBINATIONS[combination]()
        self.leaves = leaves_of(self.specimen, self.combination)
        self.scorer: MultiPose | None = None
        if accumulator is not None:
            self.scorer = MultiPose(
                self.specimen.model, self.combination, accumulator=accumulator, call=self.specimen.call, **options
            )

    def predict(self, count: int = 5, first: int = 0) -> MultiPosePrediction:
        poses = self.specimen.make_poses(first + count)[first:]
        if self.scorer is not None:
            return self.scorer(poses)
        return full_graph(self.specimen.model, poses, self.combination, call=self.specimen.call)

    @property
    def gradients(self) -> Gradients:
        return gradients_of(self.leaves)


def assert_same_after(
    train: Callable[[Trainee], object], name: str, combination: str, accumulator: str, place: Place, **options: Any
) -> Trainee:
    """Train both ways, compare what is left, and return what the group trained."""
    found = Trainee(name, combination, accumulator, place, **options)
    expected = Trainee(name, combination, None, place)
    train(found)
    train(expected)
    assert_same_gradients(found.gradients, expected.gradients)
    return found


pytestmark = pytest.mark.parametrize("accumulator", ACCUMULATORS)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS[1:])
def test_groups_of_every_size(name: str, loss: str, count: int, accumulator: str, double: Place) -> None:
    found = train_by_group(build(name, double), COMBINATIONS["boltzmann"], LOSSES[loss], count, accumulator)
    expected = train_by_full_graph(build(name, double), COMBINATIONS["boltzmann"], LOSSES[loss], count)
    assert_same_training(found, expected)


# -- several groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", COMBINED_BY)
@pytest.mark.parametrize("name", MODELS)
class TestSeveralGroups:
    def test_in_one_loss(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            first, second, third = trainee.predict(3), trainee.predict(4, 3), trainee.predict(1, 7)
            margin = (first.combined - second.combined).square() + third.combined * first.per_pose.mean(0)
            margin.sum().backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_backward_in_the_order_of_the_forwards(
        self, name: str, combination: str, accumulator: str, double: Place
    ) -> None:
        def train(trainee: Trainee) -> None:
            for prediction in [trainee.predict(3), trainee.predict(5)]:
                of_both(prediction).backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_backward_in_the_other_order(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            for prediction in [trainee.predict(3), trainee.predict(5)][::-1]:
                of_both(prediction).backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_a_group_between_forward_and_backward_of_another(
        self, name: str, combination: str, accumulator: str, double: Place
    ) -> None:
        def train(trainee: Trainee) -> None:
            outer = trainee.predict(5)
            of_both(trainee.predict(3)).backward()
            with torch.no_grad():
                trainee.predict(2)
            trainee.predict(4)  # dropped
            of_both(outer).backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_accumulated(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            for count in (3, 1, 5):
                (of_both(trainee.predict(count)) / 3).backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_beside_plain_forwards(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            (pose,) = trainee.specimen.make_poses(1)
            plain = trainee.specimen.call(trainee.specimen.model, pose)
            (plain.square().sum() + of_both(trainee.predict(4))).backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_in_a_list_of_losses(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            torch.autograd.backward([of_combined(trainee.predict(3)), of_both(trainee.predict(5))])

        assert_same_after(train, name, combination, accumulator, double)


# -- one group ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", COMBINED_BY)
@pytest.mark.parametrize("name", MODELS)
class TestOneGroup:
    def test_existing_gradients_are_added_to(
        self, name: str, combination: str, accumulator: str, double: Place
    ) -> None:
        def train(trainee: Trainee) -> None:
            for leaf in trainee.leaves.values():
                leaf.grad = torch.full_like(leaf, 7.0)
            of_both(trainee.predict()).backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_the_outer_scale(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            (of_both(trainee.predict()) * 2.0**16).backward()

        def unscaled(trainee: Trainee) -> None:
            of_both(trainee.predict()).backward()

        scaled = assert_same_after(train, name, combination, accumulator, double).gradients
        once = assert_same_after(unscaled, name, combination, accumulator, double).gradients
        shrunk = {leaf: None if each is None else each / 2.0**16 for leaf, each in scaled.items()}
        assert_same_gradients(shrunk, once)

    def test_twice_with_retain_graph(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            loss = of_both(trainee.predict())
            loss.backward(retain_graph=True)
            loss.backward(retain_graph=True)
            loss.backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_two_losses_one_after_the_other(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            prediction = trainee.predict()
            prediction.per_pose.square().sum().backward(retain_graph=True)
            of_combined(prediction).backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_plain_sums_with_retain_graph(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:  # coefficients of exactly 1: nothing needs scaling, all could be handed on
            prediction = trainee.predict()
            prediction.per_pose.sum().backward(retain_graph=True)
            prediction.per_pose.sum().backward()

        assert_same_after(train, name, combination, accumulator, double)

    def test_a_second_backward_without_retain_graph(
        self, name: str, combination: str, accumulator: str, double: Place
    ) -> None:
        trainee = Trainee(name, combination, accumulator, double)
        combined, predictions = trainee.predict()
        predictions.sum().backward()
        with (
            untouched(trainee.specimen.model),
            pytest.raises(RuntimeError, match="backward through the graph a second"),
        ):
            combined.sum().backward()

    def test_autograd_grad_as_the_outer_call(
        self, name: str, combination: str, accumulator: str, double: Place
    ) -> None:
        gradients = []
        for how in (accumulator, None):
            trainee = Trainee(name, combination, how, double)
            leaves = list(trainee.leaves.values())
            found = torch.autograd.grad(of_both(trainee.predict()), leaves, allow_unused=True)
            assert all(leaf.grad is None for leaf in leaves)
            gradients.append(dict(zip(trainee.leaves, found, strict=True)))
        assert_same_gradients(*gradients)

    def test_autograd_grad_of_some_leaves(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        gradients = []
        for how in (accumulator, None):
            trainee = Trainee(name, combination, how, double)
            chosen = dict(list(trainee.leaves.items())[1::2])
            found = torch.autograd.grad(of_both(trainee.predict()), list(chosen.values()), allow_unused=True)
            gradients.append(dict(zip(chosen, found, strict=True)))
            assert all(leaf.grad is None for leaf in trainee.leaves.values())
        assert_same_gradients(*gradients)

    def test_backward_into_some_leaves(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            of_both(trainee.predict()).backward(inputs=list(trainee.leaves.values())[1::2])

        assert_same_after(train, name, combination, accumulator, double)

    def test_a_vector_for_the_backward(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            combined, predictions = trainee.predict(4)
            combined.backward(torch.full_like(combined, -2.0), retain_graph=True)
            predictions.backward(torch.arange(4.0).to(predictions).view_as(predictions))

        assert_same_after(train, name, combination, accumulator, double)

    def test_a_gradient_of_zero(self, name: str, combination: str, accumulator: str, double: Place) -> None:
        def train(trainee: Trainee) -> None:
            (0.0 * of_both(trainee.predict())).backward()

        assert_same_after(train, name, combination, accumulator, double)


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(4, 5), slice(0, 5, 2), slice(5, 5)], ids=str)
def test_a_loss_on_some_poses_only(accumulator: str, chosen: slice, double: Place) -> None:
    def train(trainee: Trainee) -> None:
        trainee.predict(5).per_pose[chosen].square().sum().backward()

    trainee = assert_same_after(train, "plain_mlp", "boltzmann", accumulator, double)
    assert trainee.scorer is not None
    if accumulator in {"recompute", "auto"}:
        assert trainee.scorer.report.recomputed == len(range(5)[chosen])
        assert trainee.scorer.report.skipped == 5 - len(range(5)[chosen])


def test_a_detached_combination_beside_a_loss_on_the_poses(accumulator: str, double: Place) -> None:
    def train(trainee: Trainee) -> None:
        combined, predictions = trainee.predict(5)
        (predictions - combined.detach()).square().sum().backward()

    assert_same_after(train, "plain_mlp", "boltzmann learnable", accumulator, double)


def test_detached_poses_beside_a_loss_on_the_combination(accumulator: str, double: Place) -> None:
    def train(trainee: Trainee) -> None:
        combined, predictions = trainee.predict(5)
        (predictions.detach() - combined).square().sum().backward()

    trainee = assert_same_after(train, "plain_mlp", "boltzmann learnable", accumulator, double)
    assert trainee.scorer is not None
    assert trainee.scorer.report.recomputed == (5 if trainee.scorer.report.accumulator == "recompute" else 0)


def test_predictions_can_be_worked_on_in_place(accumulator: str, double: Place) -> None:
    def train(trainee: Trainee) -> None:
        combined, predictions = trainee.predict(5)
        if trainee.scorer is None:  # where combination and user share one tensor, autograd forbids it
            combined, predictions = combined.clone(), predictions.clone()
        predictions.mul_(3).add_(1)
        combined.add_(predictions.sum())
        (combined.sum() + predictions.square().sum()).backward()

    assert_same_after(train, "plain_mlp", "boltzmann learnable", accumulator, double)


@pytest.mark.parametrize("whose", ["parameters", "encoder", "predictions", "combined"])
def test_a_users_hook_that_is_not_linear(whose: str, accumulator: str, double: Place) -> None:
    calls: dict[str | None, int] = {accumulator: 0, None: 0}

    def train(trainee: Trainee) -> None:
        how = None if trainee.scorer is None else accumulator

        def clamp(gradient: Tensor) -> Tensor:
            calls[how] += 1
            return (10 * gradient).clamp(-0.01, 0.01)

        if whose in {"parameters", "encoder"}:
            leaves = [
                leaf for name, leaf in trainee.leaves.items() if name.startswith("encoder") == (whose == "encoder")
            ]
            for leaf in leaves:
                leaf.register_hook(clamp)
        combined, predictions = trainee.predict(5)
        if whose == "predictions":
            predictions.register_hook(clamp)
        if whose == "combined":
            combined.register_hook(clamp)
        (combined.square().sum() + predictions.square().sum()).backward()

    if whose == "predictions":  # in the full graph they feed the combination, too
        found = Trainee("shared_encoder_output", "boltzmann", accumulator, double)
        train(found)
        assert calls[accumulator] == 1
        return
    assert_same_after(train, "shared_encoder_output", "boltzmann", accumulator, double)
    assert calls[accumulator] == calls[None] > 0


def test_hooks_after_the_accumulation_run_once(accumulator: str, double: Place) -> None:
    trainee = Trainee("tied_weights", "boltzmann", accumulator, double)
    calls: list[int] = []
    for place, leaf in enumerate(trainee.leaves.values()):
        leaf.register_post_accumulate_grad_hook(lambda _, place=place: calls.append(place))
    of_both(trainee.predict()).backward()
    assert sorted(calls) == list(range(len(trainee.leaves)))


# -- the loop -------------------------------------------------------------------------------------------------------


def test_an_optimizer_in_the_backward(accumulator: str, double: Place) -> None:
    values = []
    for how in (accumulator, None):
        trainee = Trainee("plain_mlp", "boltzmann learnable", how, double)
        steps: list[int] = []
        for leaf in trainee.leaves.values():
            leaf.register_post_accumulate_grad_hook(_stepping(torch.optim.SGD([leaf], lr=0.1, momentum=0.9), steps))
        for count in (5, 3, 4):
            steps.clear()
            of_both(trainee.predict(count)).backward()
            assert len(steps) == len(trainee.leaves)
        values.append({name: leaf.detach().clone() for name, leaf in trainee.leaves.items()})
        assert all(leaf.grad is None for leaf in trainee.leaves.values())
    for name, value in values[0].items():
        torch.testing.assert_close(value, values[1][name], rtol=1e-12, atol=1e-12)


def _stepping(optimizer: torch.optim.Optimizer, steps: list[int]) -> Callable[[Tensor], None]:
    def step(leaf: Tensor) -> None:
        steps.append(id(leaf))
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_training_loop(optimizer: Any, set_to_none: bool, accumulator: str, double: Place) -> None:
    losses, norms = ([], []), ([], [])
    for place, how in enumerate((accumulator, None)):
        trainee = Trainee("shared_encoder_output", "boltzmann learnable", how, double)
        leaves = list(trainee.leaves.values())
        stepping = optimizer(leaves, lr=0.01)
        for step in range(4):
            for count in (3, 4):
                loss = of_both(trainee.predict(count + step % 2)) / 2
                loss.backward()
                losses[place].append(loss.item())
            norms[place].append(nn.utils.clip_grad_norm_(leaves, 0.1).item())
            stepping.step()
            stepping.zero_grad(set_to_none=set_to_none)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


def test_a_step_between_forward_and_backward_is_refused(accumulator: str, double: Place) -> None:
    trainee = Trainee("plain_mlp", "boltzmann", accumulator, double)
    prediction = trainee.predict()
    with torch.no_grad():
        trainee.specimen.model.get_parameter("0.bias").add_(1.0)
    with untouched(trainee.specimen.model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_both(prediction).backward()
    trainee = Trainee("shared_encoder_output", "boltzmann", accumulator, double)
    prediction = trainee.predict()
    with torch.no_grad():
        trainee.leaves["encoder 2.weight"].mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_both(prediction).backward()


@contextmanager
def _grad_and_no_grad() -> Iterator[None]:
    with torch.no_grad(), torch.set_grad_enabled(True):
        yield


WITHIN: dict[str, Callable[[], Any]] = {
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "grad enabled again": _grad_and_no_grad,
    "inference mode that is off": lambda: torch.inference_mode(False),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda saved: saved),
    "disk": lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.numpy, torch.from_numpy),
    "multithreading that is off": lambda: torch.autograd.set_multithreading_enabled(False),
    "deterministic": lambda: _deterministic(),  # noqa: PLW0108  # defined below
    "nothing": nullcontext,
}


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("backward_too", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("context", WITHIN)
def test_within_contexts_of_autograd(context: str, backward_too: bool, accumulator: str, double: Place) -> None:
    def train(trainee: Trainee) -> None:
        with WITHIN[context]():
            loss = of_both(trainee.predict(5))
            if backward_too:
                loss.backward()
        if not backward_too:
            loss.backward()

    assert_same_after(train, "plain_mlp", "boltzmann learnable", accumulator, double)


@pytest.mark.parametrize("name", ["dropout", "batch_norm_in_training", "spectral_norm_by_parametrization"])
def test_evaluation_mode(name: str, accumulator: str, double: Place) -> None:
    def train(trainee: Trainee) -> None:
        trainee.specimen.model.eval()
        if trainee.scorer is not None:
            trainee.scorer.eval()
        of_both(trainee.predict(5)).backward()
        assert not any(module.training for module in trainee.specimen.model.modules())

    assert_same_after(train, name, "boltzmann", accumulator, double)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_prediction_alone(mode: Callable[[], Any], accumulator: str, double: Place) -> None:
    trainee = Trainee("shared_encoder_output", "boltzmann learnable", accumulator, double)
    with untouched(trainee.specimen.model), mode():
        combined, predictions = trainee.predict(5)
    assert not combined.requires_grad
    assert not predictions.requires_grad
    assert trainee.scorer is not None
    assert (trainee.scorer.report.poses, trainee.scorer.report.backwards) == (5, 0)
    with torch.no_grad():
        expected = Trainee("shared_encoder_output", "boltzmann learnable", None, double).predict(5)
    torch.testing.assert_close(combined.clone(), expected.combined, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(predictions.clone(), expected.per_pose, rtol=1e-12, atol=1e-12)


def test_a_model_that_is_frozen_trains_the_combination(accumulator: str, double: Place) -> None:
    def train(trainee: Trainee) -> None:
        trainee.specimen.model.requires_grad_(False)
        prediction = trainee.predict(5)
        assert prediction.combined.requires_grad
        assert not prediction.per_pose.requires_grad
        of_combined(prediction).backward()

    assert_same_after(train, "plain_mlp", "boltzmann learnable", accumulator, double)


REPORTS = {
    # backwards, skipped, recomputed after a loss on the combination, and after one on the first of five poses as well
    "store": ((5, 0, 0), (5, 0, 0)),
    "stream": ((5, 0, 0), (6, 0, 1)),
    "recompute": ((5, 0, 5), (5, 0, 5)),
    "auto": ((5, 0, 5), (5, 0, 5)),
}


def test_reports(accumulator: str, double: Place) -> None:
    trainee = Trainee("plain_mlp", "boltzmann", accumulator, double)
    assert trainee.scorer is not None
    for loss, expected in zip((of_combined, _of_the_first_too), REPORTS[accumulator], strict=True):
        trainee = Trainee("plain_mlp", "boltzmann", accumulator, double)
        assert trainee.scorer is not None
        loss(trainee.predict(5)).backward()
        report = trainee.scorer.report
        assert (report.backwards, report.skipped, report.recomputed) == expected
        assert (report.poses, report.chunks, report.graphs_kept) == (5, 5, 0)
        assert report.accumulator == ("recompute" if accumulator == "auto" else accumulator)
        assert report.reason


def _of_the_first_too(prediction: MultiPosePrediction) -> Tensor:
    return of_combined(prediction) + prediction.per_pose[0].sum()


def test_each_group_has_a_report_of_its_own(accumulator: str, double: Place) -> None:
    trainee = Trainee("plain_mlp", "boltzmann", accumulator, double)
    assert trainee.scorer is not None
    first = trainee.predict(5)
    report_of_the_first = trainee.scorer.report
    second = trainee.predict(3)
    report_of_the_second = trainee.scorer.report
    of_combined(second).backward()
    of_combined(first).backward()
    assert (report_of_the_first.poses, report_of_the_first.backwards) == (5, 5)
    assert (report_of_the_second.poses, report_of_the_second.backwards) == (3, 3)

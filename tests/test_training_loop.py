"""Groups in a training loop: optimizers, clipping, modes of autograd, evaluation, frozen models."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from backward_cases import FIRST_GROUP_ACCUMULATORS, BackwardCase, assert_gradients_of_full_graph, case_label
from model_state import unchanged
from model_zoo import TensorFactory
from torch import Tensor, nn
from training_reference import ACCUMULATORS, loss_on_both, loss_on_combined


def test_an_optimizer_in_the_backward(double: TensorFactory) -> None:
    def train(accumulator: str | None) -> dict[str, Tensor]:
        case = BackwardCase("plain_mlp", "boltzmann learnable", accumulator, double)
        steps: list[int] = []
        for leaf in case.leaves.values():
            leaf.register_post_accumulate_grad_hook(_step_hook(torch.optim.SGD([leaf], lr=0.1, momentum=0.9), steps))
        for count in (5, 3, 4):
            steps.clear()
            loss_on_both(case.predict(count)).backward()
            assert len(steps) == len(case.leaves)
        assert all(leaf.grad is None for leaf in case.leaves.values())
        return {name: leaf.detach().clone() for name, leaf in case.leaves.items()}

    expected = train(None)
    for accumulator in ACCUMULATORS:
        with case_label(accumulator):
            torch.testing.assert_close(train(accumulator), expected, rtol=1e-12, atol=1e-12)


def _step_hook(optimizer: torch.optim.Optimizer, steps: list[int]) -> Callable[[Tensor], None]:
    def step(leaf: Tensor) -> None:
        steps.append(id(leaf))
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_training_loop(optimizer: Any, set_to_none: bool, double: TensorFactory) -> None:
    def train(accumulator: str | None) -> tuple[list[float], list[float]]:
        losses, norms = [], []
        case = BackwardCase("shared_encoder_output", "boltzmann learnable", accumulator, double)
        leaves = list(case.leaves.values())
        stepping = optimizer(leaves, lr=0.01)
        for step in range(4):
            for count in (3, 4):
                loss = loss_on_both(case.predict(count + step % 2)) / 2
                loss.backward()
                losses.append(loss.item())
            norms.append(nn.utils.clip_grad_norm_(leaves, 0.1).item())
            stepping.step()
            stepping.zero_grad(set_to_none=set_to_none)
        return losses, norms

    expected_losses, expected_norms = train(None)
    for accumulator in ACCUMULATORS:
        losses, norms = train(accumulator)
        assert losses == pytest.approx(expected_losses, rel=1e-9), accumulator
        assert norms == pytest.approx(expected_norms, rel=1e-9), accumulator


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_step_between_forward_and_backward_is_refused(accumulator: str, double: TensorFactory) -> None:
    case = BackwardCase("plain_mlp", "boltzmann", accumulator, double)
    prediction = case.predict()
    with torch.no_grad():
        case.model_case.model.get_parameter("0.bias").add_(1.0)
    with unchanged(case.model_case.model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_on_both(prediction).backward()
    case = BackwardCase("shared_encoder_output", "boltzmann", accumulator, double)
    prediction = case.predict()
    with torch.no_grad():
        case.leaves["encoder 2.weight"].mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_on_both(prediction).backward()


# -- contexts and modes ---------------------------------------------------------------------------------------------


@contextmanager
def _grad_enabled_within_no_grad() -> Iterator[None]:
    with torch.no_grad(), torch.set_grad_enabled(True):
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "grad enabled within no_grad": _grad_enabled_within_no_grad,
    "inference mode switched off": lambda: torch.inference_mode(False),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda saved: saved),
    "saved as arrays of numpy": lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.numpy, torch.from_numpy),
    "multithreading switched off": lambda: torch.autograd.set_multithreading_enabled(False),
    "deterministic": _deterministic,
    "none": nullcontext,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("around_backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_of_autograd(context: str, around_backward: bool, double: TensorFactory) -> None:
    def train(case: BackwardCase) -> None:
        with CONTEXTS[context]():
            loss = loss_on_both(case.predict(5))
            if around_backward:
                loss.backward()
        if not around_backward:
            loss.backward()

    assert_gradients_of_full_graph(train, "plain_mlp", "boltzmann learnable", double)


@pytest.mark.parametrize("name", ["dropout", "batch_norm_in_training", "spectral_norm_by_parametrization"])
def test_evaluation_mode(name: str, double: TensorFactory) -> None:
    def train(case: BackwardCase) -> None:
        case.model_case.model.eval()
        if case.scorer is not None:
            case.scorer.eval()
        loss_on_both(case.predict(5)).backward()
        assert not any(module.training for module in case.model_case.model.modules())

    assert_gradients_of_full_graph(train, name, "boltzmann", double, FIRST_GROUP_ACCUMULATORS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_prediction_without_grad_mode(accumulator: str, mode: Callable[[], Any], double: TensorFactory) -> None:
    case = BackwardCase("shared_encoder_output", "boltzmann learnable", accumulator, double)
    with unchanged(case.model_case.model), mode():
        combined, predictions = case.predict(5)
    assert not combined.requires_grad
    assert not predictions.requires_grad
    assert case.scorer is not None
    assert (case.scorer.report.poses, case.scorer.report.backwards) == (5, 0)
    with torch.no_grad():
        expected = BackwardCase("shared_encoder_output", "boltzmann learnable", None, double).predict(5)
    torch.testing.assert_close(combined.clone(), expected.combined, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(predictions.clone(), expected.per_pose, rtol=1e-12, atol=1e-12)


def test_a_frozen_model_trains_the_combination(double: TensorFactory) -> None:
    def train(case: BackwardCase) -> None:
        case.model_case.model.requires_grad_(False)
        prediction = case.predict(5)
        assert prediction.combined.requires_grad
        assert not prediction.per_pose.requires_grad
        loss_on_combined(prediction).backward()

    assert_gradients_of_full_graph(train, "plain_mlp", "boltzmann learnable", double)

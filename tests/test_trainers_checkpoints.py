"""Trainers save, resume, validate, predict, cast outputs and use loss functions as with the bare model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import (
    OF_TRAINERS,
    STEPS,
    FullGraph,
    Group,
    ReturnsLoss,
    accelerator_of,
    lightning_module,
    lightning_trainer,
    loader_of,
    loss_of,
    missing,
    transformers_trainer,
)

import gradhooks

pytestmark = OF_TRAINERS


class Tied(nn.Module):
    """A model whose two hidden layers share a weight, which safetensors saves once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.readout = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(0.2)

    def forward(self, pose: Tensor) -> Tensor:
        prediction: Tensor = self.readout(self.dropout(self.second(self.first(pose).tanh()).tanh()))
        return prediction


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = nn.Parameter(self.second.weight.detach().clone())


def model_of(kind: type[nn.Module] = Untied, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().double()


def scorer_of(model: nn.Module) -> gradhooks.MultiPose:
    return gradhooks.MultiPose(model, gradhooks.combinations.Boltzmann(learnable=True))


def reference_of(model: nn.Module) -> FullGraph:
    return FullGraph(model, gradhooks.combinations.Boltzmann(learnable=True))


@pytest.fixture
def groups() -> list[Group]:
    return [([torch.randn(6).double() for _ in range(2 + group % 3)], torch.randn(1).double()) for group in range(12)]


def assert_same_weights(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    for parameter, reference in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, reference, rtol=tolerance, atol=tolerance)


# -- Hugging Face ---------------------------------------------------------------------------------------------------


def test_transformers_resumes_as_the_full_graph(groups: list[Group], tmp_path: Path) -> None:
    reference, interrupted, resumed = reference_of(model_of()), scorer_of(model_of()), scorer_of(model_of(seed=1))
    saving = {"save_strategy": "steps", "save_steps": 2}
    transformers_trainer(ReturnsLoss(reference), groups, tmp_path / "reference").train()
    transformers_trainer(ReturnsLoss(interrupted), groups, tmp_path / "scorer", **saving).train()
    checkpoint = tmp_path / "scorer" / "checkpoint-2"
    transformers_trainer(ReturnsLoss(resumed), groups, tmp_path / "scorer").train(str(checkpoint))
    assert_same_weights(interrupted, reference)
    assert_same_weights(resumed, reference)

    files = pytest.importorskip("safetensors.torch", reason=missing("safetensors"))
    saved = files.load_file(tmp_path / "scorer" / f"checkpoint-{STEPS}" / "model.safetensors")
    assert set(saved) == {f"scorer.{name}" for name in [*model_of().state_dict(), "combination.log_temperature"]}


def test_transformers_trains_a_scorer_with_a_loss_function(groups: list[Group], tmp_path: Path) -> None:
    """With `compute_loss_func`, which receives the output of the model, the scorer needs no module around it."""

    def collate(batch: list[Group]) -> dict[str, Any]:
        ((poses, target),) = batch
        return {"poses": poses, "labels": target}

    def loss(prediction: Any, target: Tensor, num_items_in_batch: Any) -> Tensor:
        return (prediction.combined - target).square().sum() / num_items_in_batch

    reference, trained = reference_of(model_of()), scorer_of(model_of())
    for scorer in (reference, trained):
        more = {"compute_loss_func": loss}
        options = {"gradient_accumulation_steps": 2, "more": more, "collate": collate}
        transformers_trainer(scorer, groups, tmp_path, **options).train()
    assert_same_weights(trained, reference)


# -- Lightning ------------------------------------------------------------------------------------------------------


def test_lightning_saves_and_resumes(groups: list[Group], tmp_path: Path) -> None:
    def train(scorer: nn.Module, steps: int, checkpoint: str | None = None) -> Any:
        # Lightning's checkpoints contain no random state.
        scorer.model.get_submodule("dropout").p = 0.0  # type: ignore[operator, union-attr]
        trainer = lightning_trainer(max_steps=steps, default_root_dir=tmp_path)
        trainer.fit(lightning_module(scorer), loader_of(groups[:2]), ckpt_path=checkpoint)  # two steps per epoch
        assert trainer.global_step == steps
        return trainer

    resumed = []
    for make in (scorer_of, reference_of):
        halfway = str(tmp_path / f"{make.__name__}.ckpt")
        train(make(model_of()), 2).save_checkpoint(halfway)
        resumed.append(make(model_of(seed=1)))
        train(resumed[-1], STEPS, halfway)
    assert_same_weights(*resumed)
    saved = torch.load(tmp_path / "scorer_of.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"scorer.{name}" for name in [*model_of().state_dict(), "combination.log_temperature"]}


def test_lightning_validates_and_predicts_in_inference_mode(groups: list[Group], tmp_path: Path) -> None:
    scorer, reference = scorer_of(model_of()), reference_of(model_of())
    trainer = lightning_trainer(default_root_dir=tmp_path)
    actual, expected = (
        trainer.validate(lightning_module(validated), loader_of(groups), verbose=False)[0]["loss"]
        for validated in (scorer, reference)
    )
    assert actual == pytest.approx(expected, rel=1e-6)  # Lightning logs float32
    predictions = trainer.predict(lightning_module(scorer), loader_of(groups))
    for (poses, _), prediction in zip(groups, predictions, strict=True):
        assert prediction.per_pose.shape == (len(poses), 1)
        torch.testing.assert_close(prediction.coefficients().sum(0), torch.ones(1).double())


# -- Accelerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tied, Untied])
def test_accelerate_saves_and_loads(kind: type[nn.Module], groups: list[Group], tmp_path: Path) -> None:
    accelerator = accelerator_of()
    scorer = accelerator.prepare(scorer_of(model_of(kind)))
    loss_of(scorer, groups).backward()
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(scorer, str(tmp_path / "model"))
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(1.0)
    accelerator.load_state(str(tmp_path / "state"))
    assert_same_weights(scorer, scorer_of(model_of(kind)), tolerance=0.0)

    accelerate = pytest.importorskip("accelerate", reason=missing("accelerate"))
    loaded = scorer_of(model_of(kind, seed=1))
    accelerate.load_checkpoint_in_model(loaded, str(tmp_path / "model"))
    assert_same_weights(loaded, scorer, tolerance=0.0)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_accelerate_in_mixed_precision_returns_predictions(grad_mode: Any, groups: list[Group]) -> None:
    accelerator = accelerator_of(mixed_precision="bf16")
    scorer = scorer_of(model_of().float().eval())
    poses = [pose.float() for pose in groups[0][0]]
    with grad_mode():
        with torch.autocast("cpu", torch.bfloat16):
            expected = scorer(poses)
        prediction = accelerator.prepare(scorer)(poses)
        assert isinstance(prediction, gradhooks.MultiPosePrediction)
        assert [part.dtype for part in prediction] == [torch.float32, torch.float32]
        assert torch.equal(prediction.combined, expected.combined)
        torch.testing.assert_close(prediction.coefficients(), expected.coefficients().float(), rtol=1e-2, atol=1e-2)

"""Trains a scorer in Lightning, in the Trainer of transformers and with Accelerate, none of them modified."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradhooks.testing import full_graph

# Marks of a test module that uses trainers. The warnings are Lightning's: about a dependency, and about loaders that
# are short, have no worker, or are missing.
OF_TRAINERS = [
    pytest.mark.usefixtures("_reset_trainer_state"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader"),
]

STEPS = 5
Group = tuple[list[Tensor], Tensor]
MakeOptimizer = Callable[..., torch.optim.Optimizer]

# AdamW divides a gradient by its size, so rounding errors of narrow types determine the step of gradients near zero.
ADAMW: MakeOptimizer = partial(torch.optim.AdamW, lr=1e-2)
SGD: MakeOptimizer = partial(torch.optim.SGD, lr=1e-1, momentum=0.5)


class FullGraph(nn.Module):
    """Combines poses by plain PyTorch, with the interface of `MultiPose`."""

    def __init__(self, model: nn.Module, combination: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.combination, self.options = model, combination, options

    def forward(self, poses: Any) -> Any:
        return full_graph(self.model, poses, self.combination, **self.options)


def loss_of(scorer: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Return the mean over groups of a loss that uses the combined prediction and those of the poses."""
    losses = []
    for poses, target in groups:
        combined, per_pose = scorer(poses)
        losses.append((combined - target).square().sum() + 0.1 * per_pose.square().mean())
    return torch.stack(losses).mean()


def missing(package: str) -> str:
    return f"{package} is missing; pip install -e '.[test,examples,trainers]' installs what the tests of trainers need"


@contextmanager
def fast_garbage_collection() -> Iterator[None]:
    """Exclude existing objects from garbage collections: those of Accelerate take 0.3 s with all its imports."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def lightning_module(scorer: nn.Module, optimizer: MakeOptimizer = ADAMW) -> Any:
    lightning = pytest.importorskip("lightning.pytorch", reason=missing("lightning"))

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.scorer = scorer

        def training_step(self, groups: Sequence[Group], _: int) -> Tensor:
            return loss_of(self.scorer, groups)

        def validation_step(self, groups: Sequence[Group], _: int) -> None:
            self.log("loss", loss_of(self.scorer, groups), batch_size=len(groups))

        def predict_step(self, groups: Sequence[Group], _: int) -> Any:
            return self.scorer(groups[0][0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters())

    return Module()


def lightning_trainer(**options: Any) -> Any:
    lightning = pytest.importorskip("lightning.pytorch", reason=missing("lightning"))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet = {"enable_checkpointing": False, **quiet}
    return lightning.Trainer(**{"accelerator": "cpu", "devices": 1, "max_steps": STEPS, **quiet, **options})


def loader_of(groups: Sequence[Group], size: int = 1) -> DataLoader[Any]:
    return DataLoader(groups, batch_size=size, collate_fn=list)  # type: ignore[arg-type]


def in_lightning(
    scorer: nn.Module, groups: Sequence[Group], folder: Path, optimizer: MakeOptimizer, size: int = 1, **options: Any
) -> None:
    trainer = lightning_trainer(default_root_dir=folder, **options)
    torch.manual_seed(3)
    trainer.fit(lightning_module(scorer, optimizer), loader_of(groups, size))
    assert trainer.global_step == STEPS


class ReturnsLoss(nn.Module):
    """A model for the Trainer of transformers."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        return {"loss": loss_of(self.scorer, groups)}


def transformers_trainer(
    model: nn.Module, groups: Sequence[Any], folder: Path, *, collate: Any = None, more: Any = None, **options: Any
) -> Any:
    """Return a `Trainer`; `more` are its own arguments, `options` those of `TrainingArguments`."""
    transformers = pytest.importorskip("transformers", reason=missing("transformers"))
    pytest.importorskip("accelerate", reason=missing("accelerate"))
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 1, "use_cpu": True, "remove_unused_columns": False}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**quiet, **defaults, **options})
    collate = collate or (lambda batch: {"groups": batch})

    class FastTrainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def train(self, *positional: Any, **named: Any) -> Any:
            with fast_garbage_collection():
                return super().train(*positional, **named)

    return FastTrainer(model=model, args=arguments, train_dataset=list(groups), data_collator=collate, **(more or {}))


def in_transformers(
    scorer: nn.Module, groups: Sequence[Group], folder: Path, optimizer: MakeOptimizer, **options: Any
) -> None:
    model = ReturnsLoss(scorer)
    more = {"optimizers": (optimizer(model.parameters()), None)}
    trainer = transformers_trainer(model, groups, folder, more=more, **options)
    trainer.train()
    assert trainer.state.global_step == STEPS


def accelerator_of(**options: Any) -> Any:
    accelerate = pytest.importorskip("accelerate", reason=missing("accelerate"))
    return accelerate.Accelerator(cpu=True, **options)


def in_accelerate(
    scorer: nn.Module, groups: Sequence[Group], folder: Path, optimizer: MakeOptimizer, **options: Any
) -> None:
    del folder
    clip, size = options.pop("clip", None), options.pop("size", 1)
    accelerator = accelerator_of(**options)
    scorer, prepared, loader = accelerator.prepare(scorer, optimizer(scorer.parameters()), loader_of(groups, size))
    torch.manual_seed(3)
    steps = 0
    while steps < STEPS:
        for batch in loader:
            with accelerator.accumulate(scorer):
                accelerator.backward(loss_of(scorer, batch))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(scorer.parameters(), clip)
                prepared.step()
                prepared.zero_grad()
            steps += accelerator.sync_gradients
            if steps == STEPS:
                break

"""Bags of digits in the Trainer of Hugging Face transformers: a module whose forward returns the loss, as its own do.

    python examples/with_transformers.py                 # half a minute on one core
    python examples/with_transformers.py --combination top_k_mean --bf16

Does the bag hold a 9? (See `digit_bags.py`.) The collator hands the bags of a batch to the module as a list, since
no two need have the same number of images. The images come with scikit-learn; nothing is downloaded.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from digit_bags import LEARNING_RATE, WEIGHT_DECAY, Bag, data, network
from digit_bags import arguments as data_options
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import EvalPrediction, Trainer, TrainingArguments

import gradhooks
from gradhooks.profiling import table


class BagClassifier(nn.Module):
    """What the Trainer trains; whether `scorer` keeps one graph or all of them makes no difference to it."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, bags: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The loss, and the logit of each bag."""
        logits = torch.cat([self.scorer(images).combined for images in bags])
        return {"loss": binary_cross_entropy_with_logits(logits, labels), "logits": logits}


def collate(bags: Sequence[Bag]) -> dict[str, Any]:
    """The keyword arguments of the forward."""
    return {"bags": [bag.images for bag in bags], "labels": torch.cat([bag.label for bag in bags])}


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """PosePartition of the bags whose label is right."""
    return {"accuracy": float(((found.predictions > 0) == (found.label_ids > 0)).mean())}


def train(
    scorer: nn.Module, training: Sequence[Bag], held_out: Sequence[Bag], folder: str, **options: Any
) -> list[dict[str, float]]:
    """The Trainer's log; `options` are of `TrainingArguments`."""
    trainer = Trainer(
        model=BagClassifier(scorer),
        args=TrainingArguments(
            output_dir=folder,
            learning_rate=3 * LEARNING_RATE,  # of a step for four bags, and it goes down to 0
            weight_decay=WEIGHT_DECAY,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            remove_unused_columns=False,  # a bag is no row of a table
            **options,
        ),
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer.state.log_history


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Bags of digits in transformers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--combination", default="noisy_or", help="of the logits of the images")
    parser.add_argument("--bags", type=int, default=300, help="training bags, and as many held-out ones")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training bags")
    parser.add_argument("--bf16", action="store_true", help="in mixed precision")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print what became of the loss and of the held-out bags."""
    options = arguments(argv)
    training, held_out = data(data_options([f"--bags={options.bags}", f"--held-out={options.bags}"]))
    torch.manual_seed(0)
    scorer = gradhooks.MultiPose(network(1), options.combination, chunk_size=16)  # the one line
    with tempfile.TemporaryDirectory() as folder:
        log = train(
            scorer,
            training,
            held_out,
            folder,
            num_train_epochs=options.epochs,
            bf16=options.bf16,
            use_cpu=True,
            logging_strategy="epoch",
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
        )
    trained, judged = ([entry for entry in log if name in entry] for name in ("loss", "eval_accuracy"))
    rows = [
        [f"{one['epoch']:.0f}", f"{one['loss']:.3f}", f"{other['eval_loss']:.3f}", f"{other['eval_accuracy']:.3f}"]
        for one, other in zip(trained, judged, strict=True)
    ]
    print(table(["epoch", "loss", "held-out loss", "held-out accuracy"], rows))


if __name__ == "__main__":
    torch.set_num_threads(1)  # of so small a network more threads are slower
    main()

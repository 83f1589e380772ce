"""Train on bags of digits in the Trainer of Hugging Face transformers, with a module whose forward returns the loss.

    python examples/with_transformers.py                 # half a minute on one core
    python examples/with_transformers.py --combination top_k_mean --bf16

Does the bag hold a 9? (See `digit_bags.py`.) The collator makes groups of images from the bags of a batch, whose
numbers of images differ; they are one call of the scorer. The images come with scikit-learn; nothing is downloaded.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from digit_bags import LEARNING_RATE, WEIGHT_DECAY, Bag, collate, load_bags, network
from digit_bags import parse_arguments as data_options
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import EvalPrediction, Trainer, TrainingArguments

import gradhooks


class BagClassifier(nn.Module):
    """The module that the Trainer trains; it does not depend on how `scorer` computes gradients."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, groups: gradhooks.Groups, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss and the logit of each bag."""
        logits = self.scorer(groups).combined
        return {"loss": binary_cross_entropy_with_logits(logits, labels), "logits": logits}


def keyword_arguments(bags: Sequence[Bag]) -> dict[str, Any]:
    """Return the keyword arguments of the forward."""
    groups, labels = collate(bags)
    return {"groups": groups, "labels": labels}


def accuracy(evaluation: EvalPrediction) -> dict[str, float]:
    """Return the fraction of the bags whose label is predicted correctly."""
    return {"accuracy": float(((evaluation.predictions > 0) == (evaluation.label_ids > 0)).mean())}


def train(
    scorer: nn.Module, training: Sequence[Bag], held_out: Sequence[Bag], folder: str, **options: Any
) -> list[dict[str, float]]:
    """Train, and return the Trainer's log; `options` go to `TrainingArguments`."""
    trainer = Trainer(
        model=BagClassifier(scorer),
        args=TrainingArguments(
            output_dir=folder,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            remove_unused_columns=False,  # a bag has no named columns
            **options,
        ),
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=keyword_arguments,
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer.state.log_history


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Bags of digits with transformers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--combination", default="noisy_or", help="combines the logits of the images")
    parser.add_argument("--bags", type=int, default=300, help="number of training bags and of held-out bags")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training bags")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the losses and the accuracy of each epoch."""
    options = parse_arguments(argv)
    training, held_out = load_bags(data_options([f"--bags={options.bags}", f"--held-out={options.bags}"]))
    torch.manual_seed(0)
    scorer = gradhooks.MultiPose(network(1), options.combination)
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
    trained, evaluated = ([entry for entry in log if name in entry] for name in ("loss", "eval_accuracy"))
    rows = [
        [int(trained_epoch["epoch"]), trained_epoch["loss"], evaluation["eval_loss"], evaluation["eval_accuracy"]]
        for trained_epoch, evaluation in zip(trained, evaluated, strict=True)
    ]
    headers = ["epoch", "loss", "held-out loss", "held-out accuracy"]
    print(tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f"))


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for a network this small
    main()

"""Train on bags of digits with Accelerate: attention over the images of a bag, in full or mixed precision.

    python examples/with_accelerate.py                   # half a minute on one core
    python examples/with_accelerate.py --mixed-precision bf16
    accelerate launch examples/with_accelerate.py        # on several GPUs, if `accelerate config` says so

Does the bag hold a 9? (See `digit_bags.py`.) A batch is two bags, that is two groups of images in one call of the
scorer; Accelerate accumulates the gradients of two batches per optimizer step. The images come with scikit-learn;
nothing is downloaded.
"""

import argparse
from collections.abc import Sequence

import gradhooks_mil
import torch
from accelerate import Accelerator
from digit_bags import EMBEDDING, LEARNING_RATE, WEIGHT_DECAY, Bag, collate, load_bags, network
from digit_bags import parse_arguments as data_options
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

import gradhooks

BATCH_SIZE = 2


class AttentionClassifier(gradhooks.Combination):
    """Pool embeddings by gated attention and classify the result: a combination may contain another."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.attention = gradhooks_mil.GatedAttention(features, hidden=32)
        self.classifier = nn.Linear(features, 1)

    def forward(self, predictions: Tensor) -> Tensor:
        """Return the logit, shape `(1,)`, of embeddings of shape `(N, features)`."""
        logit: Tensor = self.classifier(self.attention(predictions))
        return logit

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int) -> Tensor:
        """Return the logits of all bags, shape `(count, 1)`, in a few kernels."""
        logits: Tensor = self.classifier(self.attention.forward_groups(predictions, groups, count))
        return logits


def train(
    scorer: nn.Module, training: Sequence[Bag], held_out: Sequence[Bag], epochs: int, accelerator: Accelerator
) -> list[tuple[float, float]]:
    """Train, and return for each epoch the loss and the accuracy on the held-out bags."""
    optimizer = torch.optim.Adam(scorer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    loader = DataLoader(training, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate)
    held_out_loader = DataLoader(held_out, batch_size=BATCH_SIZE, collate_fn=collate)
    scorer, optimizer, loader, held_out_loader = accelerator.prepare(scorer, optimizer, loader, held_out_loader)
    curve = []
    for _ in range(epochs):
        losses = []
        for groups, labels in loader:
            with accelerator.accumulate(scorer):
                loss = binary_cross_entropy_with_logits(scorer(groups).combined, labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(scorer.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        with torch.no_grad():
            correct = [(scorer(groups).combined > 0) == (labels > 0) for groups, labels in held_out_loader]
        loss_per_batch, accuracies = accelerator.gather((torch.stack(losses), torch.cat(correct).float()))
        curve.append((loss_per_batch.mean().item(), accuracies.mean().item()))
    return curve


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Bags of digits with Accelerate.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--bags", type=int, default=300, help="number of training bags and of held-out bags")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training bags")
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="as in Accelerate")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the loss and the accuracy of each epoch."""
    options = parse_arguments(argv)
    accelerator = Accelerator(mixed_precision=options.mixed_precision, gradient_accumulation_steps=2)
    training, held_out = load_bags(data_options([f"--bags={options.bags}", f"--held-out={options.bags}"]))
    torch.manual_seed(0)
    scorer = gradhooks.MultiPose(network(EMBEDDING), AttentionClassifier(EMBEDDING))
    curve = train(scorer, training, held_out, options.epochs, accelerator)
    rows = [[epoch, loss, accuracy] for epoch, (loss, accuracy) in enumerate(curve, start=1)]
    accelerator.print(tabulate(rows, ["epoch", "loss", "held-out accuracy"], tablefmt="pipe", floatfmt=".3f"))


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for a network this small
    main()

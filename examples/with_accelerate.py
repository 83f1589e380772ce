"""Bags of digits in Accelerate's loop: attention over the images of a bag, in full or mixed precision.

    python examples/with_accelerate.py                   # half a minute on one core
    python examples/with_accelerate.py --mixed-precision bf16
    accelerate launch examples/with_accelerate.py        # on several GPUs, if `accelerate config` says so

Does the bag hold a 9? (See `digit_bags.py`.) A batch is one bag, that is one group of images; Accelerate makes a step
of the optimizer of four. The images come with scikit-learn; nothing is downloaded.
"""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from digit_bags import EMBEDDING, LEARNING_RATE, WEIGHT_DECAY, AttentionClassifier, Bag, data, network
from digit_bags import arguments as data_options
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

import gradhooks
from gradhooks.profiling import table


def first(bags: Sequence[Bag]) -> Bag:
    """The one bag of a batch."""
    return bags[0]


def train(
    scorer: nn.Module, training: Sequence[Bag], held_out: Sequence[Bag], epochs: int, accelerator: Accelerator
) -> list[tuple[float, float]]:
    """Of each epoch the loss and the accuracy for held-out bags."""
    optimizer = torch.optim.Adam(scorer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    loader = DataLoader(training, batch_size=1, shuffle=True, collate_fn=first)
    held_out_loader = DataLoader(held_out, batch_size=1, collate_fn=first)
    scorer, optimizer, loader, held_out_loader = accelerator.prepare(scorer, optimizer, loader, held_out_loader)
    curve = []
    for _ in range(epochs):
        losses = []
        for bag in loader:
            with accelerator.accumulate(scorer):
                loss = binary_cross_entropy_with_logits(scorer(bag.images).combined, bag.label)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(scorer.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        with torch.no_grad():
            right = [(scorer(bag.images).combined > 0) == (bag.label > 0) for bag in held_out_loader]
        everywhere = accelerator.gather((torch.stack(losses), torch.cat(right).float()))
        curve.append((everywhere[0].mean().item(), everywhere[1].mean().item()))
    return curve


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Bags of digits in Accelerate.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--bags", type=int, default=300, help="training bags, and as many held-out ones")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training bags")
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="of Accelerate")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print what became of the loss and of the held-out bags."""
    options = arguments(argv)
    accelerator = Accelerator(mixed_precision=options.mixed_precision, gradient_accumulation_steps=4)
    training, held_out = data(data_options([f"--bags={options.bags}", f"--held-out={options.bags}"]))
    torch.manual_seed(0)
    scorer = gradhooks.MultiPose(network(EMBEDDING), AttentionClassifier(EMBEDDING), chunk_size=16)  # the one line
    curve = train(scorer, training, held_out, options.epochs, accelerator)
    rows = [[str(epoch), *(f"{number:.3f}" for number in numbers)] for epoch, numbers in enumerate(curve, start=1)]
    accelerator.print(table(["epoch", "loss", "held-out accuracy"], rows))


if __name__ == "__main__":
    torch.set_num_threads(1)  # of so small a network more threads are slower
    main()

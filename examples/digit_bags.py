"""Does the bag hold a 9? Multiple-instance learning on scikit-learn's handwritten digits.

    python examples/digit_bags.py                          # about a minute on two cores
    python examples/digit_bags.py --combinations noisy_or DSMIL CLAM_SB

A bag is a group of images with one label: whether any of them is a 9. The labels of the images are not used to train.
All images of a batch of bags are one call of `MultiPose`. A combination is a name of gradhooks, or a head of torchmil.
Every combination is trained on the same bags; the plot shows which digits determined the prediction, and the attention
of the head to each. The images come with scikit-learn; nothing is downloaded. On a CPU, repeated runs of a command
print the same numbers, except for times.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from tqdm import tqdm

import gradhooks
from gradhooks.combinations import Pooling

TARGET_DIGIT = 9
EMBEDDING = 16
HEADS = ("ABMIL", "CLAM_SB", "DSMIL", "TransMIL")  # of torchmil
BATCH_SIZE = 4  # bags per optimizer step
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-4


class Bag(NamedTuple):
    """A group of images.

    Attributes:
        images: Shape `(N, 1, 8, 8)`, in [0, 1].
        digits: The labels of the images, shape `(N,)`; not used in training.
        label: 1.0 if one is a 9, shape `(1,)`.
    """

    images: Tensor
    digits: Tensor
    label: Tensor


class Result(NamedTuple):
    """The result of training with one combination.

    Attributes:
        name: The name of the combination.
        accuracy: Fraction of the held-out bags whose label is predicted correctly.
        found: Fraction of the held-out bags with a 9 in which the image with the largest coefficient, or attention, is
            a 9.
        seconds: Duration of the training.
        shares: For each held-out bag, the relative size of each image's coefficient, shape `(N,)`, with sum 1.
        heat: For each held-out bag, the attention of the head to each image, shape `(N,)`, scaled to [0, 1]; empty
            for a combination that is no head.
    """

    name: str
    accuracy: float
    found: float
    seconds: float
    shares: list[Tensor]
    heat: list[Tensor]


def network(outputs: int) -> nn.Module:
    """Return a network from images `(n, 1, 8, 8)` to `(n, outputs)`: logits of the images, or embeddings."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, outputs),
    )


def scorer_of(name: str, memory: str) -> gradhooks.MultiPose:
    """Return a model of bags: the network predicts a logit for each image, the combination one for the bag.

    For a head of torchmil the network predicts embeddings; the head is trained with it.
    """
    if name not in HEADS:
        return gradhooks.MultiPose(network(1), name, memory=memory)
    import torchmil.models  # noqa: PLC0415 - takes seconds, and the other examples need only the data of this one

    head = getattr(torchmil.models, name)((EMBEDDING,), att_dim=32)
    return gradhooks.MultiPose(network(EMBEDDING), Pooling(head, return_att=True), memory=memory)


def collate(bags: Sequence[Bag]) -> tuple[gradhooks.Groups, Tensor]:
    """Return the images of several bags as groups, and the labels, shape `(bags, 1)`."""
    batch: tuple[gradhooks.Groups, Tensor] = gradhooks.collate_groups([(bag.images, bag.label) for bag in bags])
    return batch


def bags_of(images: Tensor, digits: Tensor, count: int, size: int, generator: torch.Generator) -> list[Bag]:
    """Draw bags of `size - 2` to `size + 2` images; every second one contains at least one 9."""
    positive, negative = (digits == TARGET_DIGIT).nonzero().flatten(), (digits != TARGET_DIGIT).nonzero().flatten()

    def draw(indices: Tensor, number: int) -> Tensor:
        return indices[torch.randint(len(indices), (number,), generator=generator)]

    bags = []
    for index in range(count):
        total = max(1, size + int(torch.randint(-2, 3, (), generator=generator)))
        nines = index % 2 * int(torch.randint(1, max(2, total // 4 + 1), (), generator=generator))
        chosen = torch.cat([draw(positive, nines), draw(negative, total - nines)])
        chosen = chosen[torch.randperm(total, generator=generator)]
        bags.append(Bag(images[chosen], digits[chosen], torch.tensor([float(nines > 0)])))
    return bags


def load_bags(options: argparse.Namespace) -> tuple[list[Bag], list[Bag]]:
    """Return training bags and held-out bags, which have no image in common."""
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(loaded.target)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(digits), generator=generator)
    training, held_out = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    return (
        bags_of(images[training], digits[training], options.bags, options.size, generator),
        bags_of(images[held_out], digits[held_out], options.held_out, options.size, generator),
    )


def train(scorer: gradhooks.MultiPose, bags: Sequence[Bag], epochs: int, title: str) -> float:
    """Train by batches of bags and return the duration in seconds."""
    optimizer = torch.optim.Adam(scorer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    loader = DataLoader(bags, BATCH_SIZE, shuffle=True, collate_fn=collate)
    started = time.perf_counter()
    for _ in tqdm(range(epochs), desc=title, leave=False, disable=None):
        for groups, labels in loader:
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(scorer(groups).combined.view_as(labels), labels).backward()
            optimizer.step()
    return time.perf_counter() - started


@torch.no_grad()
def evaluate(name: str, scorer: gradhooks.MultiPose, bags: Sequence[Bag], seconds: float) -> Result:
    """Measure the accuracy, and which images determined each prediction."""
    groups, labels = collate(bags)
    prediction = scorer(groups)
    accuracy = ((prediction.combined.view_as(labels) > 0) == (labels > 0)).float().mean().item()
    counts = [len(bag.digits) for bag in bags]
    # d logit / d prediction of an image: a number, or a vector if the prediction is an embedding.
    sizes = prediction.coefficients().flatten(1).norm(dim=1).split(counts)
    shares = [size / size.sum().clamp_min(1e-30) for size in sizes]
    heat = [scaled(scores) for scores in prediction.attention.flatten().split(counts)] if name in HEADS else []
    found = [
        bool(bag.digits[scores.argmax()] == TARGET_DIGIT)
        for bag, scores in zip(bags, heat or shares, strict=True)
        if bag.label > 0
    ]
    return Result(name, accuracy, sum(found) / max(1, len(found)), seconds, shares, heat)


def scaled(scores: Tensor) -> Tensor:
    """Scale the attention scores of a bag to [0, 1]; heads return them before or after their softmax."""
    return (scores - scores.min()) / (scores.max() - scores.min()).clamp_min(1e-30)


def plot(results: Sequence[Result], bags: Sequence[Bag], path: Path) -> None:
    """Draw two bags, with a 9 and without: the digits in the heat of the last head, and their shares below."""
    shown = [next(i for i, bag in enumerate(bags) if (bag.label > 0) == label) for label in (True, False)]
    columns = max(len(bags[index].digits) for index in shown)
    figure = Figure(figsize=(columns, 2.2 * len(shown)), layout="constrained")
    heat = next((result.heat for result in reversed(results) if result.heat), None)
    axes = figure.subplots(2 * len(shown), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, index in enumerate(shown):
        for column, image in enumerate(bags[index].images):
            axes[2 * row, column].imshow(image[0].numpy(), cmap="gray_r")
            if heat is not None:
                red = heat[index][column].expand(image[0].shape).numpy()
                axes[2 * row, column].imshow(red, cmap="Reds", vmin=0, vmax=1, alpha=0.5)
            axes[2 * row, column].set_title(f"{bags[index].digits[column]}")
            heights = [result.shares[index][column].item() for result in results]
            bars = axes[2 * row + 1, column]
            bars.bar(range(len(results)), heights, color=[f"C{number}" for number in range(len(results))])
            bars.set_ylim(0, 1)
            bars.axis("on")
            bars.set_xticks([])
            bars.set_yticks([0, 1] if column == 0 else [])
    handles = [Patch(color=f"C{number}", label=result.name) for number, result in enumerate(results)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(results))
    figure.suptitle(
        "Share of each image in the prediction, and the head's attention in red: a bag with a 9, and one without"
    )
    figure.savefig(path, dpi=120)


def table(results: Sequence[Result]) -> str:
    """Return one line per combination."""
    rows = [[result.name, result.accuracy, result.found, result.seconds] for result in results]
    headers = ["combination", "accuracy", "9 found", "seconds"]
    return tabulate(rows, headers, tablefmt="plain", floatfmt=("", ".3f", ".3f", ".1f"))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Bags of digits.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--combinations", nargs="+", default=["max", "noisy_or", "ABMIL"], metavar="NAME")
    parser.add_argument("--bags", type=int, default=300, help="training bags")
    parser.add_argument("--held-out", type=int, default=300, help="held-out bags")
    parser.add_argument("--size", type=int, default=10, help="images per bag, plus or minus two")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training bags")
    parser.add_argument("--memory", default="1GiB", help="of a step beyond that of one image: bytes, 64MiB, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the bags, the weights and the order")
    parser.add_argument("--output", type=Path, default=Path("digit_bags.png"), help="file of the plot")
    options = parser.parse_args(argv)
    for name, minimum in {"bags": 2, "held_out": 2, "size": 1, "epochs": 1, "seed": 0}.items():
        if getattr(options, name) < minimum:
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum}")
    return options


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Train and evaluate every combination."""
    options = parse_arguments(argv)
    training, held_out = load_bags(options)
    results = []
    for name in options.combinations:
        torch.manual_seed(options.seed)
        scorer = scorer_of(name, options.memory)
        seconds = train(scorer, training, options.epochs, name)
        results.append(evaluate(name, scorer, held_out, seconds))
    plot(results, held_out, options.output)
    print(table(results))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for a network this small
    main()

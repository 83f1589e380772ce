"""Does the bag hold a 9? Multiple-instance learning on scikit-learn's handwritten digits.

    python examples/digit_bags.py                          # less than a minute on two cores
    python examples/digit_bags.py --combinations noisy_or top_k_mean

A bag is a group of images, and has one label: whether any of them is a 9. Which one it is the training is never told.
Every combination is trained on the same bags; the plot shows which digits made the prediction. The images come with
scikit-learn; nothing is downloaded. On a CPU every run of a command gives the same numbers, but for the times.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gradhooks_mil
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

import gradhooks

SOUGHT = 9
EMBEDDING = 16
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4


class Bag(NamedTuple):
    """A group of images.

    Attributes:
        images: Shape `(N, 1, 8, 8)`, in [0, 1].
        digits: What they show, shape `(N,)`; never seen in training.
        label: 1.0 if one is a 9, shape `(1,)`.
    """

    images: Tensor
    digits: Tensor
    label: Tensor


class Result(NamedTuple):
    """What became of one combination.

    Attributes:
        name: Its name.
        accuracy: PosePartition of the held-out bags whose label is right.
        found: PosePartition of the held-out bags with a 9 in which the heaviest image is a 9.
        seconds: How long training took.
        shares: For each held-out bag, how much each image made the prediction, shape `(N,)`, of sum 1.
    """

    name: str
    accuracy: float
    found: float
    seconds: float
    shares: list[Tensor]


class AttentionClassifier(gradhooks.Combination):
    """Pools embeddings by gated attention and classifies the result: a combination may hold another."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.attention = gradhooks_mil.GatedAttention(features, hidden=32)
        self.classifier = nn.Linear(features, 1)

    def forward(self, predictions: Tensor) -> Tensor:
        """The logit, shape `(1,)`, of embeddings of shape `(N, features)`."""
        logit: Tensor = self.classifier(self.attention(predictions))
        return logit


def network(outputs: int) -> nn.Module:
    """From images `(n, 1, 8, 8)` to `(n, outputs)`: logits of the images, or embeddings."""
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


def attention_scorer(chunk: int) -> gradhooks.MultiPose:
    """The network makes embeddings, whose attention is trained with it."""
    return gradhooks.MultiPose(network(EMBEDDING), AttentionClassifier(EMBEDDING), chunk_size=chunk)


def scorer_of(name: str, chunk: int) -> gradhooks.MultiPose:
    """A model of bags: the network makes a logit of every image, and the combination one of the bag."""
    special: dict[str, Callable[[int], gradhooks.MultiPose]] = {"gated_attention": attention_scorer}
    if name in special:
        return special[name](chunk)
    return gradhooks.MultiPose(network(1), name, chunk_size=chunk)


def bags_of(images: Tensor, digits: Tensor, count: int, size: int, generator: torch.Generator) -> list[Bag]:
    """Bags of `size - 2` to `size + 2` images, every other with one 9 or more."""
    positive, negative = (digits == SOUGHT).nonzero().flatten(), (digits != SOUGHT).nonzero().flatten()

    def draw(places: Tensor, number: int) -> Tensor:
        return places[torch.randint(len(places), (number,), generator=generator)]

    bags = []
    for index in range(count):
        total = max(1, size + int(torch.randint(-2, 3, (), generator=generator)))
        sought = index % 2 * int(torch.randint(1, max(2, total // 4 + 1), (), generator=generator))
        chosen = torch.cat([draw(positive, sought), draw(negative, total - sought)])
        chosen = chosen[torch.randperm(total, generator=generator)]
        bags.append(Bag(images[chosen], digits[chosen], torch.tensor([float(sought > 0)])))
    return bags


def data(options: argparse.Namespace) -> tuple[list[Bag], list[Bag]]:
    """Training bags, and held-out ones made of images that no training bag has."""
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
    """Train bag by bag; returns the seconds it took."""
    optimizer = torch.optim.Adam(scorer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    started = time.perf_counter()
    for _ in tqdm(range(epochs), desc=title, leave=False, disable=None):
        for index in torch.randperm(len(bags)).tolist():
            bag = bags[index]
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(scorer(bag.images).combined, bag.label).backward()
            optimizer.step()
    return time.perf_counter() - started


def judge(name: str, scorer: gradhooks.MultiPose, bags: Sequence[Bag], seconds: float) -> Result:
    """Accuracy, and which images made each prediction."""
    right, shares, found = [], [], []
    with torch.no_grad():
        for bag in bags:
            prediction = scorer(bag.images)
            right.append(bool((prediction.combined > 0) == (bag.label > 0)))
            # d logit / d prediction of an image: a number, or a vector where images have embeddings.
            weights = prediction.coefficients().flatten(1).norm(dim=1)
            shares.append(weights / weights.sum().clamp_min(1e-30))
            if bag.label > 0:
                found.append(bool(bag.digits[weights.argmax()] == SOUGHT))
    return Result(name, sum(right) / len(right), sum(found) / max(1, len(found)), seconds, shares)


def plot(results: Sequence[Result], bags: Sequence[Bag], path: Path) -> None:
    """For two bags, with a 9 and without, the digits and below each what it counted in every combination."""
    shown = [next(i for i, bag in enumerate(bags) if (bag.label > 0) == wanted) for wanted in (True, False)]
    columns = max(len(bags[index].digits) for index in shown)
    figure = Figure(figsize=(columns, 2.2 * len(shown)), layout="constrained")
    axes = figure.subplots(2 * len(shown), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, index in enumerate(shown):
        for column, image in enumerate(bags[index].images):
            axes[2 * row, column].imshow(image[0].numpy(), cmap="gray_r")
            axes[2 * row, column].set_title(f"{bags[index].digits[column]}")
            heights = [result.shares[index][column].item() for result in results]
            bars = axes[2 * row + 1, column]
            bars.bar(range(len(results)), heights, color=[f"C{place}" for place in range(len(results))])
            bars.set_ylim(0, 1)
            bars.axis("on")
            bars.set_xticks([])
            bars.set_yticks([0, 1] if column == 0 else [])
    handles = [Patch(color=f"C{place}", label=result.name) for place, result in enumerate(results)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(results))
    figure.suptitle("PosePartition of each image in the prediction: a bag with a 9, and one without")
    figure.savefig(path, dpi=120)


def table(results: Sequence[Result]) -> str:
    """One line for each combination."""
    lines = [f"{'combination':<18}{'accuracy':>10}{'9 found':>10}{'seconds':>10}"]
    lines += [f"{one.name:<18}{one.accuracy:>10.3f}{one.found:>10.3f}{one.seconds:>10.1f}" for one in results]
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Bags of digits.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--combinations", nargs="+", default=["max", "noisy_or", "gated_attention"], metavar="NAME")
    parser.add_argument("--bags", type=int, default=300, help="training bags")
    parser.add_argument("--held-out", type=int, default=300, help="held-out bags")
    parser.add_argument("--size", type=int, default=10, help="images in a bag, give or take two")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training bags")
    parser.add_argument("--chunk", type=int, default=16, help="images that go through the network at once")
    parser.add_argument("--seed", type=int, default=0, help="of the bags, the weights and the order")
    parser.add_argument("--output", type=Path, default=Path("digit_bags.png"), help="where the plot goes")
    options = parser.parse_args(argv)
    for name, least in {"bags": 2, "held_out": 2, "size": 1, "epochs": 1, "chunk": 1, "seed": 0}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return options


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Train and judge every combination."""
    options = arguments(argv)
    training, held_out = data(options)
    results = []
    for name in options.combinations:
        torch.manual_seed(options.seed)
        scorer = scorer_of(name, options.chunk)
        seconds = train(scorer, training, options.epochs, name)
        results.append(judge(name, scorer, held_out, seconds))
    plot(results, held_out, options.output)
    print(table(results))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # of so small a network more threads are slower
    main()

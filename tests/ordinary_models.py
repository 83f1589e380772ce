"""Models that people write without a thought for gradhooks, with poses for them: one habit each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver


class Ordinary(NamedTuple):
    """A model and the poses of a batch."""

    make: Callable[[], nn.Module]
    poses: Callable[[], list[Any]]


def vectors() -> list[Tensor]:
    return list(torch.randn(4, 4))


def signed_vectors() -> list[Tensor]:
    """Return vectors of which the last two begin with a positive number."""
    return [torch.cat([torch.tensor([sign]), row]) for sign, row in zip((-1, -2, 1, 2), torch.randn(4, 3), strict=True)]


def words() -> list[Tensor]:
    return list(torch.randint(0, 6, (4, 2)))


class Hidden(nn.Module):
    """Does something to a hidden layer that works in grad mode only."""

    def __init__(self, use: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 1)
        self.use = use

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose).tanh()
        self.use(hidden)
        return self.last(hidden)


def only_with_grad(hidden: Tensor) -> None:
    assert hidden.requires_grad


class LazyBranch(nn.Module):
    """Has a branch for some poses, and counts."""

    def __init__(self, needs_branch: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.usual, self.branch, self.norm = nn.Linear(4, 1), nn.LazyLinear(1), nn.LazyBatchNorm1d()
        self.needs_branch, self.runs = needs_branch, 0

    def forward(self, pose: Tensor) -> Tensor:
        self.runs += 1
        prediction: Tensor = self.usual(pose) / self.runs
        if self.needs_branch(pose):
            prediction = prediction + self.branch(self.norm(torch.stack([pose, pose.tanh()]))).sum(0)
        return prediction


class TrainsWithBranch(LazyBranch):
    def __init__(self) -> None:
        super().__init__(lambda _: self.training)


class DropsAndNeverBranches(LazyBranch):
    def __init__(self) -> None:
        super().__init__(lambda _: False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pose: Tensor) -> Tensor:
        return super().forward(self.dropout(pose))


class InitializesAll(nn.Module):
    """Initializes a lazy weight and an ordinary bias in a hook, as the layers of PyTorch Geometric do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.parameter.UninitializedParameter(), nn.Parameter(torch.zeros(1))
        self.hook = self.register_forward_pre_hook(self.initialize)

    def initialize(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self.weight.materialize((1, inputs[0].shape[-1]))
        with torch.no_grad():
            self.weight.uniform_()
            self.bias.uniform_()
        self.hook.remove()

    def forward(self, pose: Tensor) -> Tensor:
        return nn.functional.linear(pose, self.weight, self.bias).tanh()


class VectorQuantizer(nn.Module):
    """Marks its codebook, a buffer, and moves it."""

    codebook: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 3), nn.Linear(3, 1)
        self.register_buffer("codebook", torch.randn(6, 3))

    def forward(self, pose: Tensor) -> Tensor:
        features = self.encode(pose)
        self.codebook.requires_grad_()
        nearest = (features - self.codebook).square().sum(1).argmin()
        code = self.codebook[nearest]
        self.codebook.data[nearest] = 0.9 * code.detach() + 0.1 * features.detach()
        return self.decode(features + (code - features).detach())


class Quantized(nn.Module):
    """Trains with observers, which resize their buffers, and fake quantization."""

    def __init__(self, observer: type[Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.quantize = FakeQuantize(observer, quant_min=0, quant_max=255)

    def forward(self, pose: Tensor) -> Tensor:
        return self.last(self.quantize(self.first(pose).tanh()))


class Words(nn.Module):
    """Renormalizes the rows of its embedding when it uses them."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(6, 4, max_norm=0.5, sparse=sparse), nn.Linear(4, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.last(self.embedding(pose).tanh()).mean(0)


class Scaled(nn.Parameter):
    """A parameter with a method and an attribute."""

    scale: float

    def scaled(self) -> Tensor:
        return self.scale * self * self


class WithScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.weight = nn.Linear(4, 1), Scaled(torch.randn(4))
        self.weight.scale = 0.7

    def forward(self, pose: Tensor) -> Tensor:
        assert type(self.weight) is Scaled
        return self.last(pose * self.weight.scaled())


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.last = nn.utils.parametrizations.orthogonal(nn.Linear(3, 1))

    def forward(self, pose: Tensor) -> Tensor:
        return self.last(self.first(pose).tanh() + self.first(pose + 1))


class FreezesLate(nn.Module):
    """Freezes a layer while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.runs = nn.Linear(4, 4), nn.Linear(4, 1), 0

    def forward(self, pose: Tensor) -> Tensor:
        self.runs += 1
        if self.runs == 3:
            self.first.requires_grad_(False)
        return self.last(self.first(pose).tanh())


ORDINARY: dict[str, Ordinary] = {
    "hook on a hidden layer": Ordinary(lambda: Hidden(lambda hidden: hidden.register_hook(lambda g: 2 * g)), vectors),
    "gradient of a hidden layer": Ordinary(lambda: Hidden(Tensor.retain_grad), vectors),
    "looks at the graph": Ordinary(lambda: Hidden(lambda hidden: hidden.grad_fn.next_functions), vectors),  # type: ignore[union-attr]
    "asserts a graph": Ordinary(lambda: Hidden(only_with_grad), vectors),
    "lazy branch of later poses": Ordinary(lambda: LazyBranch(lambda pose: bool(pose[0] > 0)), signed_vectors),
    "lazy branch of no pose": Ordinary(lambda: LazyBranch(lambda _: False), vectors),
    "lazy branch of no pose, dropout": Ordinary(DropsAndNeverBranches, vectors),
    "lazy layer that initializes all": Ordinary(InitializesAll, vectors),
    "lazy branch in training": Ordinary(TrainsWithBranch, vectors),
    "marked codebook": Ordinary(VectorQuantizer, vectors),
    "fake quantization": Ordinary(lambda: Quantized(MinMaxObserver), vectors),
    "fake quantization, averaged": Ordinary(lambda: Quantized(MovingAverageMinMaxObserver), vectors),
    "embedding with max_norm": Ordinary(lambda: Words(sparse=False), words),
    "sparse embedding with max_norm": Ordinary(lambda: Words(sparse=True), words),
    "subclass of Parameter": Ordinary(WithScaled, vectors),
    "parametrizations": Ordinary(Parametrized, vectors),
    "freezes a layer": Ordinary(FreezesLate, vectors),
}

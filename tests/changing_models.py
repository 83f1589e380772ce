"""Models whose forward changes something besides gradients, and depends on it: one kind of state each."""
# ruff: noqa: ARG001, ARG002, ARG005 (all have the same signature)

import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn


class Changing(nn.Module):
    """Adds to its input a number that depends on its state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.prepare()

    def prepare(self) -> None:
        """Create the state."""

    def change(self, pose: Tensor) -> Any:
        """Change the state; return what to add."""
        raise NotImplementedError

    def forward(self, pose: Tensor) -> Tensor:
        return self.net((pose + self.change(pose.detach())).tanh())


CHANGING: dict[str, type[Changing]] = {}


def changing(model: type[Changing]) -> type[Changing]:
    CHANGING[model.__name__] = model
    return model


def by_functions(name: str, prepare: Callable[[Any], object], change: Callable[[Any, Tensor], Any]) -> None:
    """Define a model by what it prepares and how it changes."""
    CHANGING[name] = type(name, (Changing,), {"prepare": prepare, "change": change})


@changing
class CountsCalls(Changing):
    def prepare(self) -> None:
        self.calls = 0

    def change(self, pose: Tensor) -> Any:
        self.calls += 1
        return 1 / self.calls


@changing
class DecayingScale(Changing):
    def prepare(self) -> None:
        self.scale, self.mode = 1.0, "warm"

    def change(self, pose: Tensor) -> Any:
        self.scale *= 0.9
        self.mode = "cold" if self.scale < 0.7 else self.mode
        return self.scale * (2 if self.mode == "cold" else 1)


@changing
class ReplacedAverage(Changing):
    def prepare(self) -> None:
        self.average = torch.zeros(4)

    def change(self, pose: Tensor) -> Any:
        self.average = 0.9 * self.average + 0.1 * pose
        return self.average


@changing
class AverageInPlace(Changing):
    def prepare(self) -> None:
        self.average = torch.zeros(4)

    def change(self, pose: Tensor) -> Any:
        self.average.mul_(0.9).add_(0.1 * pose)
        return self.average.clone()


@changing
class AverageMadeInForward(Changing):
    def change(self, pose: Tensor) -> Any:
        self.average = 0.5 * self.average + pose if hasattr(self, "average") else pose.clone()
        return self.average


@changing
class DeletesAttribute(Changing):
    def prepare(self) -> None:
        self.first: float | None = 2.0

    def change(self, pose: Tensor) -> Any:
        if hasattr(self, "first"):
            del self.first
            return 3.0
        return 0.0


@changing
class FirstPose(Changing):
    def prepare(self) -> None:
        self.first: Tensor | None = None

    def change(self, pose: Tensor) -> Any:
        if self.first is None:
            self.first = pose.clone()
        return self.first


@changing
class HiddenBuffer(Changing):
    average: Tensor

    def prepare(self) -> None:
        self.register_buffer("average", torch.zeros(4))

    def change(self, pose: Tensor) -> Any:
        self.average.data.mul_(0.9).add_(0.1 * pose)
        return self.average.clone()


@changing
class LargeHiddenBuffer(Changing):
    """Writes behind the bytes that are looked at before each chunk."""

    average: Tensor
    size: ClassVar[int] = 5000

    def prepare(self) -> None:
        self.register_buffer("average", torch.zeros(self.size, 4))

    def change(self, pose: Tensor) -> Any:
        self.average.data[-1].mul_(0.9).add_(0.1 * pose)
        return self.average[-1].clone()


@changing
class TransposedBuffer(LargeHiddenBuffer):
    def prepare(self) -> None:
        self.register_buffer("average", torch.zeros(4, 300).t())


@changing
class ReplacedBuffer(HiddenBuffer):
    def change(self, pose: Tensor) -> Any:
        self.average = self.average * 0.9 + 0.1 * pose
        return self.average


@changing
class ReplacedBufferData(HiddenBuffer):
    def change(self, pose: Tensor) -> Any:
        self.average.data = self.average.data * 0.9 + 0.1 * pose
        return self.average


@changing
class BufferMadeInForward(Changing):
    def change(self, pose: Tensor) -> Any:
        if "seen" not in self._buffers:
            self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.seen: Tensor = self.seen + 1
        return self.seen


@changing
class BufferDeleted(HiddenBuffer):
    def change(self, pose: Tensor) -> Any:
        if "average" in self._buffers:
            del self.average
            return 1.0
        return 0.5


@changing
class GrowingBuffer(HiddenBuffer):
    def change(self, pose: Tensor) -> Any:
        length = len(self.average)
        self.average.resize_(length + 1)
        self.average[length] = pose.mean()
        return self.average.sum()


@changing
class ShrinkingBuffer(HiddenBuffer):
    """The memory begins at the same address, with fewer elements."""

    def prepare(self) -> None:
        self.register_buffer("average", torch.arange(9.0))

    def change(self, pose: Tensor) -> Any:
        self.average.data = self.average.data[:-1]
        return self.average.sum() / 30


@changing
class BufferWithNaN(HiddenBuffer):
    def change(self, pose: Tensor) -> Any:
        self.average[0] = torch.nan
        self.average[1:] += pose[1:]
        return self.average.nan_to_num()


class WithTeacher(Changing):
    teacher: Any

    def prepare(self) -> None:
        self.teacher = nn.Linear(4, 4).requires_grad_(False)

    def change(self, pose: Tensor) -> Any:
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.mul_(0.9).add_(0.1 * self.net.weight.mean())
            return self.teacher(pose)


changing(WithTeacher)


@changing
class TeacherByData(WithTeacher):
    def change(self, pose: Tensor) -> Any:
        for parameter in self.teacher.parameters():
            parameter.data = parameter.data * 0.9
        return self.teacher(pose)


@changing
class LargeTeacherByData(WithTeacher):
    def prepare(self) -> None:
        self.teacher = nn.Linear(4, 300, bias=False).requires_grad_(False)

    def change(self, pose: Tensor) -> Any:
        self.teacher.weight.data[-1].mul_(0.9)
        return self.teacher(pose)[-1]


@changing
class TeacherInList(WithTeacher):
    def prepare(self) -> None:
        self.hidden = [nn.Linear(4, 4).requires_grad_(False)]

    @property
    def teacher(self) -> Any:
        return self.hidden[0]


@changing
class NormOfWeightLimited(Changing):
    """As in EEGNet."""

    def prepare(self) -> None:
        self.first = nn.Linear(4, 4)

    def change(self, pose: Tensor) -> Any:
        self.first.weight.data = torch.renorm(self.first.weight.data, 2, 0, 0.3)
        return self.first(pose)


@changing
class DecayingWeight(NormOfWeightLimited):
    def change(self, pose: Tensor) -> Any:
        self.first.weight.data = self.first.weight.data * 0.9
        return self.first(pose)


@changing
class WeightInPlace(NormOfWeightLimited):
    def change(self, pose: Tensor) -> Any:
        self.first.weight.data.clamp_(-0.2, 0.2)
        return self.first(pose)


@changing
class LimitedEmbedding(Changing):
    def prepare(self) -> None:
        self.embedding = nn.Embedding(6, 4, max_norm=0.5)

    def change(self, pose: Tensor) -> Any:
        return self.embedding((pose[:1] * 3).long().abs() % 6).sum(0)


@changing
class OwnBatchNorm(Changing):
    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("variance", torch.ones(1))

    def change(self, pose: Tensor) -> Any:
        F.batch_norm(pose[:, None], self.mean, self.variance, training=True)
        return self.mean.clone() + self.variance


class ReadsItsStatistics(nn.BatchNorm1d):
    """As batch renormalization does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that the base class has
        super().forward(input)
        return (input - self.running_mean) / self.running_var  # type: ignore[operator]


@changing
class BatchRenorm(Changing):
    def prepare(self) -> None:
        self.norm: Any = ReadsItsStatistics(1)

    def change(self, pose: Tensor) -> Any:
        return self.norm(pose[:, None])[:, 0]


@changing
class ScriptedBatchNorm(BatchRenorm):
    def prepare(self) -> None:
        self.norm = torch.jit.script(nn.BatchNorm1d(1))

    def change(self, pose: Tensor) -> Any:
        return self.norm(pose[:, None])[:, 0] + self.norm.running_mean


@changing
class TracedBatchNorm(ScriptedBatchNorm):
    def prepare(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.norm = torch.jit.trace(nn.BatchNorm1d(1), torch.randn(4, 1))


class ExportedBatchNorm(ScriptedBatchNorm):
    def prepare(self) -> None:
        self.norm = torch.export.export(nn.BatchNorm1d(1), (torch.randn(4, 1),)).module()


if torch.__version__ >= "2.7":  # before, the graph modules of two equal programs differ in numbers of lines
    changing(ExportedBatchNorm)


class ScriptedCounter(nn.Module):
    calls: int
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.total = torch.zeros(4)

    def forward(self, pose: Tensor) -> Tensor:
        self.calls += 1
        self.total = self.total + pose
        return self.total / self.calls


@changing
class ScriptedAttributes(Changing):
    def prepare(self) -> None:
        self.counter = torch.jit.script(ScriptedCounter())

    def change(self, pose: Tensor) -> Any:
        return self.counter(pose)


@changing
class ScheduledDropout(Changing):
    def prepare(self) -> None:
        self.dropout = nn.Dropout(0.1)

    def change(self, pose: Tensor) -> Any:
        self.dropout.p = min(0.9, self.dropout.p + 0.1)
        return self.dropout(pose)


@changing
class SwitchesMode(Changing):
    def prepare(self) -> None:
        self.dropout = nn.Dropout(0.5)

    def change(self, pose: Tensor) -> Any:
        self.dropout.train(not self.dropout.training)
        return self.dropout(pose)


@changing
class CachedGraph(Changing):
    """A tensor with a graph, which the next forward detaches."""

    def prepare(self) -> None:
        self.hidden: Any = torch.zeros(4)

    def change(self, pose: Tensor) -> Any:
        self.hidden = (self.hidden.detach() + self.net.weight[0] * pose).detach()
        return self.hidden


@dataclass
class State:
    calls: int = 0
    values: list[Any] = field(default_factory=list)


@changing
class Nested(Changing):
    def prepare(self) -> None:
        self.state = {"deep": [State(), SimpleNamespace(total=0.0)], "shared": None}
        self.alias = self.state["deep"][0]  # type: ignore[index]
        self.state["cycle"] = self.state  # type: ignore[assignment]

    def change(self, pose: Tensor) -> Any:
        self.alias.calls += 1
        self.alias.values.append(pose.mean())
        self.state["deep"][1].total += self.alias.calls  # type: ignore[index]
        return self.state["cycle"]["deep"][1].total / 10 + sum(self.alias.values)  # type: ignore[index]


class Schedule:
    """An object that is neither a module nor a container."""

    def __init__(self) -> None:
        self.step = 0

    def next(self) -> float:
        self.step += 1
        return 1 / self.step


class MovingAverage:
    def __init__(self) -> None:
        self.value, self.schedule = torch.zeros(4), Schedule()

    def update(self, pose: Tensor) -> Tensor:
        self.value = self.value + self.schedule.next() * (pose - self.value)
        self.value.data.mul_(0.9)
        return self.value


@changing
class OwnObjects(Changing):
    def prepare(self) -> None:
        self.schedule = Schedule()
        self.averages = {"all": [MovingAverage()]}

    def change(self, pose: Tensor) -> Any:
        return self.schedule.next() + self.averages["all"][0].update(pose)


def _bank(self: Any, pose: Tensor) -> Any:
    self.bank.append(pose.clone())
    return torch.stack(list(self.bank)).mean(0)


def _least_recently_used(self: Any, pose: Tensor) -> Any:
    key = int(pose[0] * 2) % 3
    self.recent[key] = self.recent.pop(key, 0) + 1
    return next(iter(self.recent)) + len(self.recent)


def _counts(self: Any, pose: Tensor) -> Any:
    self.counts[int(pose[0] * 2) % 3] += 1
    return len(self.counts) + max(self.counts.values())


def _seen(self: Any, pose: Tensor) -> Any:
    self.seen.add(len(self.seen))
    return len(self.seen)


def _array(self: Any, pose: Tensor) -> Any:
    self.array[-1] += pose.mean().item()
    return float(self.array[-1])


def _tuple(self: Any, pose: Tensor) -> Any:
    self.pair = (self.pair[0] + 1, self.pair[1] + pose)
    self.pair[1].mul_(0.5)
    return self.pair[0] + self.pair[1]


by_functions("ListOfTensors", lambda self: setattr(self, "bank", []), _bank)
by_functions("Queue", lambda self: setattr(self, "bank", deque(maxlen=2)), _bank)
by_functions("LeastRecentlyUsed", lambda self: setattr(self, "recent", OrderedDict()), _least_recently_used)
by_functions("DefaultDict", lambda self: setattr(self, "counts", defaultdict(int)), _counts)
by_functions("Counts", lambda self: setattr(self, "counts", Counter()), _counts)
by_functions("Set", lambda self: setattr(self, "seen", set()), _seen)
by_functions("SmallArray", lambda self: setattr(self, "array", np.zeros(3)), _array)
by_functions("LargeArray", lambda self: setattr(self, "array", np.zeros(3000)), _array)
by_functions("Tuple", lambda self: setattr(self, "pair", (0, torch.zeros(4))), _tuple)
by_functions("LongQueue", lambda self: setattr(self, "bank", deque([torch.zeros(4)] * 2000, maxlen=2000)), _bank)

_SOURCES: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "PythonGenerator": (lambda: random.Random(0), lambda generator: generator.random()),  # noqa: S311
    "NumpyGenerator": (lambda: np.random.default_rng(0), lambda generator: generator.random()),
    "NumpyRandomState": (lambda: np.random.RandomState(0), lambda generator: generator.randn()),
    "TorchGenerator": (
        lambda: torch.Generator().manual_seed(0),
        lambda generator: torch.rand((), generator=generator).item(),
    ),
    "GlobalPython": (lambda: None, lambda _: random.random()),  # noqa: S311
    "GlobalPythonGauss": (lambda: None, lambda _: random.gauss(0, 1)),
    "GlobalNumpy": (lambda: None, lambda _: np.random.rand()),  # noqa: NPY002
    "GlobalNumpyNormal": (lambda: None, lambda _: np.random.randn()),  # noqa: NPY002
    "GlobalTorch": (lambda: None, lambda _: torch.rand(()).item()),
}
for _name, (_make, _draw) in _SOURCES.items():
    by_functions(
        _name,
        lambda self, make=_make: setattr(self, "generator", make()),  # type: ignore[misc]
        lambda self, pose, draw=_draw: draw(self.generator),  # type: ignore[misc]
    )

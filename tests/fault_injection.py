"""Inject faults: an exception at one operator that runs in a call of the library, at one line of it, or by a signal.

    python tests/fault_injection.py --faults 5000 --seed 0

Prints how many faults were injected, where nothing was raised, and what they left behind. Models, accumulators and the
place of each fault are drawn from the seed; the moment of a signal is not reproducible.
"""

import argparse
import copy
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import gradhooks

PACKAGE = str(Path(gradhooks.__file__).parent)
KINDS = ("operator", "line", "signal")


class Fault(BaseException):
    """An interrupt."""


class OrdinaryFault(Exception):  # noqa: N818 - a fault that `except Exception` catches
    """An error."""


class Stateful(nn.Module):
    """Normalization, dropout, a counter, a list, a moving average, a frozen teacher, and draws of numpy and Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 1)
        self.teacher = nn.Linear(4, 1).requires_grad_(False)
        self.register_buffer("average", torch.zeros(6))
        self.count = 0
        self.seen: list[int] = []

    def forward(self, poses: Tensor) -> Tensor:
        hidden = self.norm(self.first(poses)).tanh()
        self.average.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        self.teacher.weight.data.mul_(0.99).add_(self.first.weight.data.mean(), alpha=0.01)
        self.count += 1
        self.seen.append(self.count)
        noise = 1 + 0.1 * float(np.random.rand()) + 0.1 * random.random()  # noqa: NPY002, S311
        return (self.last(nn.functional.dropout(hidden, 0.2, self.training)) * noise + self.teacher(poses)).squeeze(-1)


class Renormalized(nn.Module):
    """A forward that gives a parameter other memory, and an LSTM, whose parameters are also in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.last = nn.Linear(5, 1)

    def forward(self, poses: Tensor) -> Tensor:
        self.linear.weight.data = torch.renorm(self.linear.weight.data, 2, 0, 0.3)
        hidden, _ = self.lstm(self.linear(poses).unsqueeze(1))
        return self.last(hidden[:, -1]).squeeze(-1)


class Case(NamedTuple):
    """What runs."""

    model: type[nn.Module]
    combination: str
    options: dict[str, Any]


CASES = [
    Case(model, combination, {"chunk_size": 2, **options})
    for model in (Stateful, Renormalized)
    for combination, options in (
        ("mean", {"accumulator": "stream"}),
        ("boltzmann", {"accumulator": "stream"}),
        ("boltzmann", {"accumulator": "recompute"}),
        ("min", {"accumulator": "store"}),
        ("max", {"memory": 0}),
        ("mean", {"memory": 2000}),
        ("boltzmann", {"memory": "1GiB"}),
    )
]


def everything(model: nn.Module) -> dict[str, Any]:
    """Return all that a fault must leave as it was: objects by identity, tensors by value."""
    parts: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tobytes(),  # type: ignore[index, union-attr] # noqa: NPY002
        "random": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "modes": len(_get_current_dispatch_mode_stack()),
    }
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                grad, hooks = parameter.grad, len(parameter._backward_hooks or ())
                parts[f"parameter {path}.{name}"] = (id(parameter), parameter.detach().clone(), hooks)
                parts[f"gradient {path}.{name}"] = (id(grad), None if grad is None else grad.clone())
        for name, buffer in module._buffers.items():
            parts[f"buffer {path}.{name}"] = None if buffer is None else (id(buffer), buffer.clone())
        own = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, list))}
        parts[f"attributes {path}"] = copy.deepcopy({k: v for k, v in own.items() if k != "_flat_weights"})
        parts[f"flat weights {path}"] = [id(weight) for weight in getattr(module, "_flat_weights", ())]
        parts[f"hooks {path}"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return parts


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the parts that differ."""
    return [name for name in {*before, *after} if not _same(before.get(name), after.get(name))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


class Injection:
    """Raises a fault in blocks that run with it: at the k-th event of them all, or when a signal arrives in one.

    Attributes:
        count: How many events there were.
    """

    def __init__(self, kind: str, place: float, fault: type[BaseException]) -> None:
        self.kind, self.place, self.fault = kind, place, fault
        self.count = 0
        self._inside = False
        self._undo = ExitStack()

    def _event(self) -> None:
        self.count += 1
        if self.count == self.place:
            sys.settrace(None)
            raise self.fault

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self._event()
        return self._trace

    def _on_signal(self, _: int, frame: FrameType | None) -> None:
        if self._inside and _is_in_library(frame):  # else the call has not begun, or is over
            raise self.fault

    def __enter__(self) -> None:
        self._undo = ExitStack()
        if self.kind == "operator":
            self._undo.enter_context(_Operators(self._event))
        elif self.kind == "line":
            self._undo.callback(sys.settrace, sys.gettrace())
            sys.settrace(self._trace)
        else:
            self._undo.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, self._on_signal))
            self._undo.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, self.place)
        self._inside = True

    def __exit__(self, *exception: object) -> None:
        self._inside = False
        self._undo.close()


class _Operators(TorchDispatchMode):
    def __init__(self, event: Callable[[], None]) -> None:
        super().__init__()
        self._event = event

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if _is_in_library(sys._getframe()):  # what autograd does before and after is PyTorch's own
            self._event()
        return func(*args, **(kwargs or {}))


def _is_in_library(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame is not None


class Trial:
    """A model, a scorer, and batches of poses."""

    def __init__(self, case: Case, seed: int, *, batches: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        self.model = case.model().double()
        self.scorer = gradhooks.MultiPose(self.model, case.combination, **case.options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        for _ in range(batches):  # a fault may arrive in the first batch, or when everything is known
            self.run(torch.randn(6, 4, dtype=torch.float64))
            self.optimizer.step()
        self.poses = torch.randn(6, 4, dtype=torch.float64)
        self.before: dict[str, Any] = {}

    def run(self, poses: Tensor, injection: AbstractContextManager[Any] = nullcontext()) -> None:  # noqa: B008
        """Run a batch, and note what a fault must leave as it was."""
        self.before, self.in_backward = everything(self.model), False
        with injection:
            combined = self.scorer(poses).combined
        loss = combined.square().sum()
        self.before, self.in_backward = everything(self.model), True
        with injection:
            loss.backward()

    def step(self, poses: Tensor) -> list[Tensor | None]:
        """Return the gradients of a batch."""
        self.optimizer.zero_grad()
        self.run(poses)
        return [parameter.grad for parameter in self.model.parameters()]

    def expected(self, poses: Tensor) -> list[Tensor | None]:
        """Return the gradients of the full graph, with the chunks of the scorer; nothing is left behind."""
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        model = copy.deepcopy(self.model)
        model.zero_grad()
        predictions = torch.cat([model(poses[start : start + 2]) for start in range(0, len(poses), 2)])
        combination = gradhooks.registry.combinations.create(_name_of(self.scorer))
        combination(predictions).square().sum().backward()
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        return [parameter.grad for parameter in model.parameters()]


def _name_of(scorer: Any) -> str:
    return str(type(scorer.combination).__name__).lower()


def inject(case: Case, kind: str, seed: int) -> tuple[bool, list[str]]:
    """Inject one fault; return whether it was raised, and what it left behind."""
    draw = random.Random(seed)  # noqa: S311
    fault = draw.choice([Fault, OrdinaryFault])
    batches = draw.choice([0, 2])
    place = draw.uniform(1e-4, 1e-2)
    if kind != "signal":
        counted, counter = Trial(case, seed, batches=batches), Injection(kind, 0, fault)
        counted.run(counted.poses, counter)
        place = draw.randint(1, counter.count)
    trial = Trial(case, seed, batches=batches)
    raised = True
    with suppress(Fault, OrdinaryFault):
        trial.run(trial.poses, Injection(kind, place, fault))
        raised = False
    left = differences(trial.before, everything(trial.model)) if raised else []
    if trial.in_backward and trial.scorer.report.plain:
        # The backward of plain poses is PyTorch's: a fault in it leaves some gradients behind, as for the full graph.
        left = [name for name in left if not name.startswith("gradient")]
    expected = trial.expected(trial.poses)
    try:
        if not all(map(_close, trial.step(trial.poses), expected)):
            left.append("the gradient of the next batch")
    except Exception as error:
        left.append(f"the next batch, which raises {error!r}")
    return raised, left


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def inject_many(faults: int, seed: int, kinds: tuple[str, ...] = KINDS) -> tuple[Counter[str], list[str]]:
    """Inject faults; return the number of each kind that was raised, and descriptions of what was left behind."""
    draw = random.Random(seed)  # noqa: S311
    counts: Counter[str] = Counter()
    failures = []
    for number in range(faults):
        case, kind = draw.choice(CASES), kinds[number % len(kinds)]
        fault_seed = draw.randrange(2**31)
        raised, left = inject(case, kind, fault_seed)
        counts[kind] += raised
        if left:
            options = {**case.options, "combination": case.combination, "model": case.model.__name__}
            failures.append(f"{kind}, seed {fault_seed}, {options}: {', '.join(left)}")
    return counts, failures


def main() -> None:
    """Inject many faults and print what they left behind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts, failures = inject_many(options.faults, options.seed)
    raised = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    lines = [f"seed {options.seed}: {options.faults} faults, raised: {raised}; {len(failures)} left something behind"]
    sys.stdout.write("\n".join([*lines, *failures[:40]]) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

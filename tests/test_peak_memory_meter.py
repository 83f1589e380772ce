"""PeakMemory gives the numbers of bytes that are worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gradhooks.profiling.peak_memory import PeakMemory

ROW = 1000  # float32 numbers, so 4000 bytes
BYTES = 4 * ROW
SCALAR = 4


def test_results_count_until_they_are_released() -> None:
    given = torch.ones(ROW)
    with PeakMemory() as memory:
        first = given * 2
        second = first + 1
        assert memory.peak == 2 * BYTES
        del first
        third = second * 3  # the same number of live storages as before
        assert memory.peak == 2 * BYTES
        fourth = third * 4
    assert memory.peak == 3 * BYTES
    assert fourth.shape == second.shape


def test_earlier_tensors_and_views_count_nothing() -> None:
    given = torch.ones(ROW)
    with PeakMemory() as memory:
        given.view(10, 100).t()[:3].mul_(2)
        given.add_(given)
    assert memory.peak == 0


def test_tensors_from_python_numbers_count() -> None:
    numbers = [1.0] * ROW
    with PeakMemory() as memory:
        torch.tensor(numbers)
    assert memory.peak == BYTES


def test_a_resized_storage_counts_its_new_size() -> None:
    given = torch.ones(ROW)
    with PeakMemory() as memory:
        grown = torch.empty(0)
        torch.cat([given, given], out=grown)
    assert memory.peak == 2 * BYTES


def test_the_graph_and_the_backward_count() -> None:
    given = torch.ones(ROW, requires_grad=True)
    with PeakMemory() as memory:
        kept = given
        for _ in range(10):
            kept = kept.exp()  # saves its result
        assert memory.peak == 10 * BYTES
        kept.sum().backward()
    # The gradients of two neighbouring operations exist at the same time, and so do the sum and its gradient. The last
    # of the ten results is held by a variable, so it is not released during the backward.
    assert memory.peak == 12 * BYTES + 2 * SCALAR


class BackwardInside(torch.autograd.Function):
    """The identity; its backward builds a graph of ten results and runs a backward through it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        leaf = value.detach().requires_grad_()
        with torch.enable_grad():
            inner = leaf
            for _ in range(10):
                inner = inner.exp()
        inner.backward(gradient)
        gradient_of_leaf: Tensor | None = leaf.grad
        assert gradient_of_leaf is not None
        return gradient_of_leaf


def test_a_backward_inside_a_backward_counts() -> None:
    given = torch.ones(ROW, requires_grad=True)
    with PeakMemory() as memory:
        BackwardInside.apply(given).sum().backward()
    assert memory.peak == 12 * BYTES + 2 * SCALAR


def test_a_meter_can_be_used_again() -> None:
    given = torch.ones(ROW)
    memory = PeakMemory()
    for rows in (3, 1):
        with memory:
            kept = [given * 2 for _ in range(rows)]
        assert memory.peak == rows * BYTES
        del kept
    with pytest.raises(ZeroDivisionError), PeakMemory():
        raise ZeroDivisionError
    assert (given * 2).numel() == ROW  # outside the block nothing is counted
    assert memory.peak == BYTES


def test_sparse_gradients_are_accepted() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    with PeakMemory() as memory:
        embedding(torch.tensor([1, 2])).sum().backward()
    assert memory.peak > 0


@pytest.mark.cuda
def test_on_cuda_the_allocator_counts() -> None:
    given = torch.ones(1 << 20, device="cuda")
    with PeakMemory("cuda") as memory:
        kept = given * 2
        del kept
    assert memory.peak == 4 << 20


def test_a_compiled_model_stays_compiled() -> None:
    runs = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        def run(*inputs: Any) -> Any:
            nonlocal runs
            runs += 1
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    model: Any = torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()), backend=backend)
    before = torch.randn(2, 8)
    model(before)
    with PeakMemory() as memory:
        model(before)
    assert (runs, memory.peak > 0) == (1, True)
    model(before)
    assert runs == 2

"""Something raises on one rank, in its own code or in the library."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rank_events.event import event
from rank_events.training import DDP, POSE_PARALLEL, Run


class LocalError(Exception):
    """Raised by the user's code on one rank."""


class RaiseInBackward(torch.autograd.Function):
    """Raises in the backward of a pose."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, fail: Callable[[], None]) -> Tensor:
        ctx.fail = fail
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        ctx.fail()


def local_error() -> None:
    raise LocalError("a bug on one rank")


def disturb(run: Run, call: int, moment: str, fail: Callable[[], None]) -> None:
    """Make the model fail in a forward on the affected rank."""

    def disturbed(hidden: Tensor) -> Tensor:
        run.calls += 1
        if run.moment == moment and run.calls == call:
            fail()
        return hidden

    if run.affected:
        run.model.disturb = disturbed


def fail_in_backward(run: Run, fail: Callable[[], None]) -> None:
    """Make the second backward of a pose of this step fail on the affected rank."""

    def disturbed(hidden: Tensor) -> Tensor:
        run.calls += 1
        return RaiseInBackward.apply(hidden, fail) if run.calls == 2 and hidden.requires_grad else hidden

    if run.affected:
        run.model.disturb = disturbed


def good_step(run: Run) -> None:
    run.train()
    run.begin_event()


@event("raises")
def the_first_pose_raises(run: Run) -> None:
    good_step(run)
    disturb(run, 1, "forward", local_error)
    run.train()


@event("raises")
def a_later_pose_raises(run: Run) -> None:
    good_step(run)
    disturb(run, 3, "forward", local_error)
    run.train()


@event("raises")
def a_pose_raises_in_the_first_batch(run: Run) -> None:
    disturb(run, 2, "forward", local_error)
    run.train()


@event("raises")
def the_second_run_raises(run: Run) -> None:
    good_step(run)
    disturb(run, 2, "backward", local_error)
    run.options["accumulator"] = "recompute"
    run.scorer.accumulator = "recompute"
    run.train()


@event("raises")
def a_backward_raises(run: Run) -> None:
    good_step(run)
    fail_in_backward(run, local_error)
    run.train()


@event("raises")
def interrupt_in_the_forward(run: Run) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    good_step(run)
    disturb(run, 2, "forward", interrupt)
    run.train()


@event("raises")
def interrupt_in_a_backward(run: Run) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    good_step(run)
    fail_in_backward(run, interrupt)
    run.train()


@event("raises")
def out_of_memory(run: Run) -> None:
    def exhaust() -> None:
        raise torch.OutOfMemoryError("out of memory")

    good_step(run)
    disturb(run, 2, "forward", exhaust)
    run.train()


@event("raises")
def out_of_memory_in_a_backward(run: Run) -> None:
    def exhaust() -> None:
        raise torch.OutOfMemoryError("out of memory")

    good_step(run)
    fail_in_backward(run, exhaust)
    run.train()


@event("raises")
def reading_poses_raises(run: Run) -> None:
    def broken() -> Iterator[Tensor]:
        yield from run.poses()
        local_error()

    good_step(run)
    run.backward(run.forward(broken() if run.affected else run.poses()))


@event("raises")
def poses_of_no_form(run: Run) -> None:
    good_step(run)
    run.backward(run.forward(3 if run.affected else run.poses()))


@event("raises")
def a_pose_requires_grad(run: Run) -> None:
    good_step(run)
    run.backward(run.forward([pose.requires_grad_(run.affected) for pose in run.poses()]))


@event("raises")
def an_unknown_argument(run: Run) -> None:
    good_step(run)
    run.backward(run.forward(**({"temprature": 1.0} if run.affected else {})))


@event("raises")
def collate_raises(run: Run) -> None:
    good_step(run)
    if run.affected:
        run.scorer.collate, run.scorer.chunk_size = lambda _: local_error(), 2
    run.train()


@event("raises")
def progress_raises(run: Run) -> None:
    good_step(run)
    if run.affected:
        run.scorer.progress = lambda done, _: local_error() if done == 2 else None
    run.train()


@event("raises")
def a_prediction_is_not_finite(run: Run) -> None:
    run.options["nonfinite"] = "raise"
    good_step(run)
    run.backward(run.forward([pose * float("nan") for pose in run.poses()] if run.affected else run.poses()))


@event("raises")
def the_loss_raises(run: Run) -> None:
    good_step(run)
    if run.affected:
        run.loss_of = lambda _: local_error()  # type: ignore
    run.train()


@event("raises")
def the_loss_raises_and_the_next_batch_is_run(run: Run) -> None:
    good_step(run)
    loss = run.forward()
    if not run.affected:
        run.backward(loss)
        run.update()
    run.train(2)


@event("raises", ways=(POSE_PARALLEL, DDP), refused=())
def the_combination_raises(run: Run) -> None:
    def combination(predictions: Tensor) -> Tensor:
        if run.affected and run.step:
            local_error()
        return predictions.mean(0)

    run.combination = combination
    good_step(run)
    run.train()


@event("raises")
def a_hook_on_the_prediction_raises(run: Run) -> None:
    good_step(run)
    loss = run.forward()
    if run.affected:
        loss.register_hook(lambda _: local_error())
    run.backward(loss)


@event("raises", ways=(POSE_PARALLEL, DDP))
def the_optimizer_raises(run: Run) -> None:
    good_step(run)
    run.backward(run.forward())
    if run.affected:
        run.optimizer.zero_grad()  # its step was left out
        run.step += 1
    else:
        run.update()
    run.train(2)


@event("raises")
def weights_change_before_the_backward(run: Run) -> None:
    good_step(run)
    loss = run.forward()
    if run.affected:
        with torch.no_grad():
            run.model.first.weight.mul_(1.01)
    run.backward(loss)


@event("raises", ways=(POSE_PARALLEL,))
def create_graph(run: Run) -> None:
    good_step(run)
    run.backward(run.forward(), create_graph=run.affected)


@event("raises")
def the_audit_refuses(run: Run) -> None:
    outside = torch.ones(6, dtype=torch.float64, requires_grad=True)
    if run.affected:
        run.model.disturb = lambda hidden: hidden * outside
    run.train()

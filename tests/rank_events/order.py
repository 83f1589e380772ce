"""One rank calls something else, or in another order."""

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join

import gradhooks
from rank_events.event import event
from rank_events.training import DDP, POSE_PARALLEL, WAYS, Run


@event("order", ways=(POSE_PARALLEL,))
def crossed_scorers(run: Run) -> None:
    scorers = [gradhooks.MultiPose(run.model, process_group=dist.group.WORLD, memory=0) for _ in range(2)]
    for scorer in reversed(scorers) if run.affected else scorers:
        run.enter("forward")
        scorer(run.poses()).combined.sum().backward()


@event("order", ways=(POSE_PARALLEL,))
def crossed_backwards(run: Run) -> None:
    losses = [run.forward() for run.step in range(2)]
    for loss in reversed(losses) if run.affected else losses:
        run.backward(loss)


@event("order", refused=(POSE_PARALLEL,))
def two_backwards(run: Run) -> None:
    run.train()
    run.begin_event()
    loss = run.forward()
    run.backward(loss, retain_graph=run.affected)
    if run.affected:
        run.backward(loss)
    run.update()
    run.train()


@event("order", refused=())
def a_graph_is_retained(run: Run) -> None:
    run.backward(run.forward(), retain_graph=run.affected)
    run.update()
    run.train()


@event("order")
def a_backward_is_left_out(run: Run) -> None:
    run.train()
    run.begin_event()
    loss = run.forward()
    if not run.affected:
        run.backward(loss)
    run.update()
    run.train(2)


@event("order", refused=())
def a_batch_more(run: Run) -> None:
    run.train(2 + run.affected)


@event("order")
def a_validation_batch(run: Run) -> None:
    run.train()
    run.begin_event()
    if run.affected:
        with torch.no_grad():
            run.forward()
    run.train()


@event("order", exact=WAYS)
def a_validation_batch_of_a_copy(run: Run) -> None:
    run.train()
    if run.affected and not run.plain:
        copied = gradhooks.MultiPose(copy.deepcopy(run.model)) if run.way != "FSDP2" else None
        with torch.no_grad():
            _ = None if copied is None else copied(run.poses())
    run.train()


@event("order", exact=WAYS)
def a_backward_in_another_thread(run: Run) -> None:
    for _ in range(2):
        loss = run.forward()
        if run.affected:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(run.backward, loss).result()
        else:
            run.backward(loss)
        run.update()


@event("order", ways=(DDP,), exact=())
def early_stop_inside_join(run: Run) -> None:
    run.wrap()
    with Join([run.module]):
        run.train(1 if run.affected else 2)


@event("order")
def a_collective_of_the_user(run: Run) -> None:
    run.train()
    run.begin_event()
    if run.affected:
        dist.all_reduce(torch.zeros(3))
    run.train()
    run.train()


@event("order")
def it_leaves_the_group(run: Run) -> None:
    run.train()
    run.begin_event()
    if run.affected:
        dist.destroy_process_group()
    run.train()

"""One rank differs from the others: in its model, its combination, its options, its poses."""

from contextlib import nullcontext

import torch
from torch import nn

from gradhooks.combinations import Boltzmann, Mean, Min
from rank_events.event import event
from rank_events.training import DDP, FSDP2, POSE_PARALLEL, WAYS, Run


@event("differs")
def other_initial_weights(run: Run) -> None:
    if run.affected:
        nn.init.normal_(run.model.second.weight)
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,))
def one_weight_differs_by_rounding(run: Run) -> None:
    with torch.no_grad():
        run.model.first.weight[3, 2] += 1e-15 * run.affected
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,))
def weights_changed_later(run: Run) -> None:
    run.train()
    run.begin_event()
    with torch.no_grad():
        run.model.second.weight *= 1.01 if run.affected else 1.0
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,))
def one_of_many_weights_changed_later(run: Run) -> None:
    layers = [nn.Linear(1, 1) for _ in range(10)]
    run.model.second = nn.Sequential(run.model.second, *layers).double()
    run.train()
    run.begin_event()
    with torch.no_grad():
        layers[-1].bias += 0.01 * run.affected
    run.train(3)  # the norms of eight parameters are compared in a batch


@event("differs", ways=(POSE_PARALLEL,))
def weights_replaced_later(run: Run) -> None:
    run.train()
    run.begin_event()
    if run.affected:
        run.model.second.weight.data = run.model.second.weight.data.flip(1)
    run.train(2)


@event("differs")
def transposed_weight(run: Run) -> None:
    run.model.first = nn.Linear(*((6, 4) if run.affected else (4, 6))).double()
    run.options["call"] = lambda model, pose: model.first.weight.sum() * pose.sum() + model.second.weight.sum().view(1)
    run.train(2)


@event("differs")
def other_dtype(run: Run) -> None:
    if run.affected:
        run.model.float()
        run.options["call"] = lambda model, pose: model(pose.float()).double()
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,), exact=(POSE_PARALLEL,))
def other_default_dtype(run: Run) -> None:
    run.wrap()
    torch.set_default_dtype(torch.float16 if run.affected else torch.float32)
    try:
        run.train(2)
    finally:
        torch.set_default_dtype(torch.float32)


@event("differs")
def a_frozen_parameter(run: Run) -> None:
    run.model.first.bias.requires_grad_(not run.affected)
    run.train(2)


@event("differs")
def a_parameter_frozen_later(run: Run) -> None:
    run.train()
    run.begin_event()
    run.model.first.bias.requires_grad_(not run.affected)
    run.train(2)


@event("differs")
def one_more_layer(run: Run) -> None:
    if run.affected:
        run.model.second = nn.Sequential(run.model.second, nn.Linear(1, 1).double())
    run.train(2)


@event("differs", exact=(POSE_PARALLEL, FSDP2))
def other_buffers(run: Run) -> None:
    run.model.seen += 7 * run.affected
    run.train(2)


@event("differs", exact=(POSE_PARALLEL, FSDP2))
def one_more_buffer(run: Run) -> None:
    if run.affected:
        run.model.register_buffer("more", torch.zeros(3))
    run.train(2)


@event("differs")
def other_combination(run: Run) -> None:
    run.combination = "mean" if run.affected else "boltzmann"
    run.train(2)


@event("differs")
def other_option_of_the_combination(run: Run) -> None:
    run.combination = Boltzmann(2.0 if run.affected else 1.0)
    run.train(2)


@event("differs", ways=(POSE_PARALLEL, DDP))
def other_learned_temperature(run: Run) -> None:
    run.combination = Boltzmann(2.0 if run.affected else 1.0, learnable=True)
    run.train(2)


@event("differs", ways=(POSE_PARALLEL, DDP))
def a_temperature_is_learned(run: Run) -> None:
    run.combination = Boltzmann(1.0, learnable=run.affected)
    run.train(2)


@event("differs")
def other_function(run: Run) -> None:
    run.combination = (lambda values: values.sum(0)) if run.affected else (lambda values: values.mean(0))
    run.train(2)


@event("differs")
def other_tolerance(run: Run) -> None:
    run.options["tolerance"] = 0.0 if run.affected else None
    run.train(2)


@event("differs")
def other_nonfinite(run: Run) -> None:
    run.options["nonfinite"] = "raise" if run.affected else "propagate"
    run.train(2)


@event("differs", exact=WAYS)
def other_memory_accumulator_and_audit(run: Run) -> None:
    if run.affected:
        run.options = {"accumulator": "recompute", "audit": False}
    run.train(2)


@event("differs", ways=(POSE_PARALLEL, DDP), exact=(POSE_PARALLEL, DDP))
def another_accumulator(run: Run) -> None:
    run.options["accumulator"] = "store" if run.affected else "stream"
    run.train(2)


@event("differs", exact=WAYS)
def other_chunk_size_and_progress(run: Run) -> None:
    if run.affected:
        run.options |= {"chunk_size": 2, "collate": torch.stack, "progress": lambda *_: None}
    run.train(2)


@event("differs")
def evaluation_mode(run: Run) -> None:
    run.wrap()
    run.model.train(not run.affected)
    run.train(2)


@event("differs", tolerance=0.1)
def autocast(run: Run) -> None:
    with torch.autocast("cpu", enabled=run.affected):
        run.train(2)


@event("differs")
def no_grad(run: Run) -> None:
    with torch.no_grad() if run.affected else nullcontext():
        loss = run.forward()
    if not run.affected:
        run.backward(loss)


@event("differs")
def inference_mode(run: Run) -> None:
    with torch.inference_mode(run.affected):
        loss = run.forward()
    if not run.affected:
        run.backward(loss)


@event("differs", exact=WAYS)
def a_hook_that_reads(run: Run) -> None:
    if run.affected:
        run.model.first.register_forward_hook(lambda *_: None)
    run.train(2)


@event("differs", exact=(POSE_PARALLEL, DDP))
def compiled(run: Run) -> None:
    if run.affected and not run.plain:
        run.model.compile(backend="eager")
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,))
def another_learning_rate(run: Run) -> None:
    run.wrap()
    run.optimizer.param_groups[0]["lr"] = 0.2 if run.affected else 0.1
    run.train(3)


@event("differs", exact=(POSE_PARALLEL, DDP), refused=(FSDP2,))
def a_parameter_is_unused(run: Run) -> None:
    run.for_ddp["find_unused_parameters"] = True
    run.options["call"] = lambda model, pose: model.first(pose).sum().view(1) if pose[0] > 50 else model(pose)
    for _ in range(2):
        run.backward(run.forward([pose + 100 for pose in run.poses()] if run.affected else run.poses()))
        run.update()


@event("differs", exact=WAYS)
def another_number_of_poses(run: Run) -> None:
    for _ in range(2):
        run.backward(run.forward(run.poses() * (3 if run.affected else 1)))
        run.update()


@event("differs", exact=WAYS)
def poses_from_a_generator(run: Run) -> None:
    for _ in range(2):
        run.backward(run.forward(iter(run.poses()) if run.affected else run.poses()))
        run.update()


@event("differs", exact=(POSE_PARALLEL,))
def no_poses(run: Run) -> None:
    for _ in range(2):
        run.backward(run.forward([] if run.affected else run.poses()))
        run.update()


@event("differs", ways=(POSE_PARALLEL,))
def another_shape_of_predictions(run: Run) -> None:
    if run.affected:
        run.options["call"] = lambda model, pose: model(pose).expand(2)
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,))
def another_dtype_of_predictions(run: Run) -> None:
    if run.affected:
        run.options["call"] = lambda model, pose: model(pose).float()
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,))
def sides(run: Run) -> None:
    if run.affected:
        run.options["call"] = lambda model, pose: (model(pose), model(pose).square())
    run.train(2)


@event("differs", exact=WAYS)
def fewer_groups(run: Run) -> None:
    run.groups = [0, 0, 0] if run.affected else [0, 2, 1]
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,))
def groups_missing(run: Run) -> None:
    run.groups = None if run.affected else [0, 1, 0]
    run.train(2)


@event("differs")
def another_loss(run: Run) -> None:
    if run.affected:
        run.loss_of = lambda prediction: prediction.combined.exp().sum()  # type: ignore[method-assign]
    run.train(2)


@event("differs")
def a_loss_that_does_not_read_the_prediction(run: Run) -> None:
    if run.affected:
        run.loss_of = lambda _: sum(each.square().sum() for each in run.model.parameters())  # type: ignore
    run.train(2)


@event("differs", ways=(POSE_PARALLEL,), exact=(POSE_PARALLEL,))
def dropped_poses(run: Run) -> None:
    run.options["nonfinite"] = "drop"
    run.combination = Mean()
    run.loss_of = lambda prediction: prediction.combined.square().sum()  # type: ignore[method-assign]
    for _ in range(2):
        first, *others = run.poses()
        dropped = [] if run.plain else [first * float("nan")]
        run.backward(run.forward([*dropped, *others] if run.affected else run.poses()))
        run.update()


@event("differs", ways=(POSE_PARALLEL,), exact=(POSE_PARALLEL,), ranks=4)
def the_lowest_pose_is_here(run: Run) -> None:
    run.combination = Min(scale=1e3)
    for _ in range(2):
        run.backward(run.forward([pose * 10 for pose in run.poses()] if run.affected else run.poses()))
        run.update()

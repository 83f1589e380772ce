"""Check that gradhooks gives a user's model the gradients of the full graph."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import Unpack

from gradhooks.engine.model_state import ModelState
from gradhooks.engine.nested import map_tensors
from gradhooks.errors import ReplayError
from gradhooks.options import Options, OptionTypes
from gradhooks.profiling.gradient_error import gradient_error
from gradhooks.profiling.result_table import ResultTable, TableContent
from gradhooks.profiling.training_batch import CombinationLike, TrainingBatch
from gradhooks.profiling.training_steps import Loss, accumulator_steps, full_graph_step, multipose_step, sum_of_combined

TOLERANCE = 1e-10
ACCUMULATORS = ("store", "stream", "recompute", "auto")


@dataclass(frozen=True)
class GradientCheck(ResultTable):
    """The result of `gradcheck`; prints as a table.

    Attributes:
        errors: Largest relative error of a parameter's gradient in float64: by accumulator with `memory=0`, so that
            all poses are intercepted, and with the given or default memory, so that poses run plainly where they fit.
        second_run_agrees: Whether a second run of every pose gives the prediction of the first.
        unused_parameters: Parameters that require grad and get no gradient from any pose, also in the full graph.
    """

    errors: dict[str, float]
    second_run_agrees: bool
    unused_parameters: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every gradient agrees and every pose can be run again."""
        return self.second_run_agrees and all(error <= TOLERANCE for error in self.errors.values())

    def table_content(self) -> TableContent:
        """Return one row per accumulator, and notes on the second run and on unused parameters."""
        rows = [[name, f"{error:.1e}", "ok" if error <= TOLERANCE else "WRONG"] for name, error in self.errors.items()]
        notes = [f"a second run of a pose gives {'the same' if self.second_run_agrees else 'ANOTHER'} prediction"]
        if self.unused_parameters:
            notes.append(f"no prediction depends on {', '.join(self.unused_parameters)}")
        return TableContent(["accumulator", "gradient error", f"<= {TOLERANCE:.0e}"], rows, notes)


def gradcheck(
    model: nn.Module,
    poses: Sequence[Any],
    combination: CombinationLike = "mean",
    *,
    loss: Loss = sum_of_combined,
    **options: Unpack[OptionTypes],
) -> GradientCheck:
    """Compare the gradients of every accumulator with those of the full graph, on a float64 copy of the model.

    Args:
        model: The bare model; it is not changed.
        poses: A list of poses, few enough for the full graph in float64.
        combination: As for `MultiPose`.
        loss: Of a prediction; the sum of the combined prediction by default.
        **options: Further options of `MultiPose`, for the accumulators that use them. `memory` counts in the last row.
    """
    double_model = copy.deepcopy(model).double()
    double_poses = [
        map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, pose) for pose in poses
    ]
    batch = TrainingBatch(double_model, double_poses, combination, None, options.get("call"), options.get("collate"))
    reference = full_graph_step(batch)
    memory = options.get("memory", Options.memory)
    intercepting: dict[str, Any] = {**options, "memory": 0}
    default: dict[str, Any] = {**options, "memory": memory}
    steps = [
        *accumulator_steps(batch, ACCUMULATORS, **intercepting),
        multipose_step(batch, name=f"memory={memory}", **default),
    ]
    gradients, second_run_agrees = {}, True
    for step in (reference, *steps):
        double_model.zero_grad()
        with ModelState(double_model).preserved():
            try:
                loss(step.forward()).backward()
            except ReplayError:
                second_run_agrees = False
        gradients[step.name] = [leaf.grad for leaf in double_model.parameters()]
    expected = gradients.pop(reference.name)
    named = zip(double_model.named_parameters(), expected, strict=True)
    unused = tuple(name for (name, leaf), gradient in named if leaf.requires_grad and gradient is None)
    errors = {name: gradient_error(actual, expected) for name, actual in gradients.items()}
    return GradientCheck(errors, second_run_agrees, unused)

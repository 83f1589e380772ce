"""check: prove that a user's own model trains right."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradhooks.engine.model_state import ModelState
from gradhooks.engine.nested import map_tensors
from gradhooks.errors import ReplayError
from gradhooks.profiling.comparison import gradient_error
from gradhooks.profiling.table import table
from gradhooks.profiling.training_steps import Loss, all_ways, total

EXACT = 1e-10


@dataclass(frozen=True)
class Proof:
    """What was found; prints as a table.

    Attributes:
        errors: Largest relative error of a parameter's gradient in float64, by accumulator.
        replays: Whether a second run of every pose gives the first one's prediction.
        unreached: Parameters that require grad and that no pose reaches, in the full graph as here.
    """

    errors: dict[str, float]
    replays: bool
    unreached: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every gradient agrees and every pose can be run again."""
        return self.replays and all(error <= EXACT for error in self.errors.values())

    def __str__(self) -> str:
        rows = [[name, f"{error:.1e}", "ok" if error <= EXACT else "WRONG"] for name, error in self.errors.items()]
        notes = [f"a second run of a pose gives {'the same' if self.replays else 'ANOTHER'} prediction"]
        if self.unreached:
            notes.append(f"no pose reaches {', '.join(self.unreached)}")
        return "\n".join([table(["accumulator", "gradient error", f"<= {EXACT:.0e}"], rows), *notes])


def gradcheck(
    model: nn.Module,
    poses: Sequence[Any],
    combination: str | Callable[[Tensor], Tensor] = "mean",
    *,
    loss: Loss = total,
    **options: Any,
) -> Proof:
    """Compare every accumulator with the full graph, on a float64 copy of the model.

    Args:
        model: The bare model; it is not touched.
        poses: A list of poses, few enough for the full graph in float64.
        combination: As for `MultiPose`.
        loss: Of a prediction; the sum of the combined one by default.
        **options: Further options of `MultiPose`.
    """
    exact = copy.deepcopy(model).double()
    wide = [
        map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, pose) for pose in poses
    ]
    first, _, *ways = all_ways(exact, wide, combination, ["store", "stream", "recompute", "auto"], **options)
    gradients, replays = {}, True
    for way in (first, *ways):
        exact.zero_grad()
        with ModelState(exact).preserved():
            try:
                loss(way.forward()).backward()
            except ReplayError:
                replays = False
        gradients[way.name] = [leaf.grad for leaf in exact.parameters()]
    wanted = gradients.pop(first.name)
    named = zip(exact.named_parameters(), wanted, strict=True)
    unreached = tuple(name for (name, leaf), gradient in named if leaf.requires_grad and gradient is None)
    errors = {name: gradient_error(found, wanted) for name, found in gradients.items()}
    return Proof(errors, replays, unreached)

"""The contract of a combination plugin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradhooks.numerics import at_least_float32


class StreamWeights(NamedTuple):
    r"""What a combination knows of its coefficients while the poses are still coming.

    With `y_i` the prediction of pose `i`, the declaration claims that numbers `a_0 .. a_K` exist, the same for all
    poses and known only when the loss is, such that

        dL/dy_i = exp(log_weights[i]) * (a_0 + a_1 features[i, 0] + ... + a_K features[i, K - 1])

    for every loss `L` of the combined prediction. Row `i` may depend on `y_i` alone. The claim is checked in every
    group: a pose that it does not explain is recomputed, so a wrong declaration costs time and never a gradient.

    Attributes:
        log_weights: Shape `(N,)`, no unit. None says that all poses weigh the same, whatever they predict; then no
            number has to leave the device before the loss is known.
        features: Shape `(N, K)` or `(N,)`, of order 1 where they vary (divide energies by the temperature).
            None says `K = 0`. Each feature costs one more copy of the gradients.
    """

    log_weights: Tensor | None = None
    features: Tensor | None = None


class Combination(torch.nn.Module):
    """Makes one prediction of the `N` predictions of a group; subclass it and write `forward`.

    It is an ordinary module in the user's own graph: autograd derives its coefficients, and parameters of its own
    are trained with everything else. `N` is small, so compute in float64 where digits could be lost.

    Keyword arguments of the user's call (masks, weights of the poses, known energies) reach both methods.

    A class may say more of itself. `api_version = 1` is the version of this contract that it was written for. The
    conformance kit reads `expected_failures`, a mapping from a check's name to the reason why the promise is not made,
    and `example(count)`, which returns predictions, where any real numbers will not do.
    """

    def forward(self, predictions: Tensor, *_: Any, **arguments: Any) -> Tensor:
        """Combine a group.

        Args:
            predictions: Shape `(N, *prediction)`, float32 or wider, in the order of the poses.
            **arguments: What the user passed beside the poses.

        Returns:
            Shape `(*prediction)` by convention, so that loss code for one pose serves a group; anything goes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(predictions)")

    def stream_weights(self, predictions: Tensor, *_: Any, **arguments: Any) -> StreamWeights | None:
        """Declare how the coefficients depend on each prediction, which makes the combination streamable.

        Args:
            predictions: Shape `(n,)`, detached, float32 or wider: some poses of a group, not all.
            **arguments: As for `forward`; of a tensor with `N` rows, the rows of these poses.

        Returns:
            The declaration for those poses, or None (the default) where there is none.
        """
        del predictions, arguments
        return None


class GradientCombination(Combination):
    """A combination that also decides what becomes of the poses' gradients: clipping, voting, conflict resolution.

    It needs every gradient, so it is served by the accumulator `store`, which `auto` then chooses: N copies of them.
    """

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        """Make the gradients to deliver.

        Plain training would deliver `einsum("n, n ... -> ...", coefficients, gradient)` for each.

        Args:
            gradients: `dy_i/dtheta` of each leaf that any pose reaches, shape `(N, *leaf)`, float32 or wider, zeros for
                the poses that do not reach it. Parameters go by their name in the model, pose inputs that require grad
                by `"input 0"`, `"input 1"`, ...
            predictions: Shape `(N,)`.
            coefficients: `dL/dy_i`, shape `(N,)`, float32 or wider.

        Returns:
            What to deliver, shape `(*leaf)`, under the same names.
        """
        raise NotImplementedError(f"{type(self).__name__} must define combine_gradients")


@dataclass(frozen=True)
class BoundCombination:
    """A combination with the arguments of one call.

    Attributes:
        combination: A `Combination`, or any callable.
        count: N.
        arguments: What the user passed beside the poses.
    """

    combination: Callable[..., Tensor]
    count: int
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For messages."""
        return getattr(self.combination, "__name__", type(self.combination).__name__)

    @property
    def combine_gradients(self) -> Callable[..., Mapping[str, Tensor]] | None:
        """What it makes of the poses' gradients, if it cares."""
        return getattr(self.combination, "combine_gradients", None)

    def __call__(self, predictions: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Combine the predictions, shape `(N, *prediction)`, or those that are `chosen`, shape `(N,)`, boolean."""
        seen = predictions.to(at_least_float32(predictions.dtype))
        if chosen is None:
            return self.combination(seen, **self.arguments)
        return self.combination(seen[chosen], **self._of_poses(chosen))

    def declare(self, predictions: Tensor, start: int) -> StreamWeights | None:
        """The declaration for the predictions, shape `(n,)`, of the poses from `start` on."""
        stream_weights = getattr(self.combination, "stream_weights", None)
        if stream_weights is None:
            return None
        declaration: StreamWeights | None = stream_weights(
            predictions.to(at_least_float32(predictions.dtype)),
            **self._of_poses(slice(start, start + len(predictions))),
        )
        return declaration

    def _of_poses(self, chosen: Tensor | slice) -> dict[str, Any]:
        return {name: self._rows(argument, chosen) for name, argument in self.arguments.items()}

    def _rows(self, argument: Any, chosen: Tensor | slice) -> Any:
        for_each_pose = isinstance(argument, Tensor) and argument.dim() > 0 and len(argument) == self.count
        return argument[chosen] if for_each_pose else argument

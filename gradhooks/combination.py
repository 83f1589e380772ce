"""The contract of a combination plugin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradhooks.numerics import at_least_float32


class StreamWeights(NamedTuple):
    r"""Declare the form of the coefficients before the loss is known.

    With `y_i` the prediction of pose `i`, the declaration claims that there are numbers `a_0 .. a_K`, the same for all
    poses, such that

        dL/dy_i = exp(log_weights[i]) * (a_0 + a_1 features[i, 0] + ... + a_K features[i, K - 1])

    for every loss `L` of the combined prediction. The numbers `a` need not be declared: they are fitted when the loss
    is known. Row `i` may depend on `y_i` only. The claim is checked in every group and a pose that it does not explain
    is recomputed, so a wrong declaration costs time but never gives a wrong gradient.

    Attributes:
        log_weights: Shape `(N,)`, dimensionless. None declares equal weights for all predictions; then nothing has to
            be copied from the device before the loss is known.
        features: Shape `(N, K)` or `(N,)`, of order 1 where they vary (divide energies by the temperature).
            None declares `K = 0`. Each feature costs one more copy of the gradients.
    """

    log_weights: Tensor | None = None
    features: Tensor | None = None


class Combination(torch.nn.Module):
    """Combine the `N` predictions of a group into one. Base class: subclass it and define `forward`.

    A combination is an ordinary module in the user's own graph. Autograd derives its coefficients, and its parameters
    are trained with those of the model. `N` is small, so compute in float64 where float32 would lose digits.

    Keyword arguments of the call `scorer(poses, name=value)` (masks, weights of the poses, known energies) are passed
    to both methods.

    Optional attributes of a subclass:

    - `api_version = 1`: the version of this contract that the class was written for.
    - `expected_failures`: a mapping from the name of a conformance check to the reason why the class does not pass it.
    - `example(count)`: a method that returns predictions of shape `(count, *prediction)` for the conformance checks, or
      a tuple of these and of the keyword arguments of a call; needed where arbitrary real numbers are not valid.
    - `example_options`: a mapping of constructor options with which the conformance checks create the class by its
      name; needed where an option is required.
    """

    def forward(self, predictions: Tensor, *_: Any, **arguments: Any) -> Tensor:
        """Combine the predictions of a group.

        Args:
            predictions: Shape `(N, *prediction)`, float32 or wider, in the order of the poses.
            **arguments: Keyword arguments of the user's call.

        Returns:
            Shape `(*prediction)` by convention, so that a loss written for one pose applies to a group. Other shapes
            are allowed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(predictions)")

    def stream_weights(self, predictions: Tensor, *_: Any, **arguments: Any) -> StreamWeights | None:
        """Declare how the coefficient of a pose depends on its prediction, which makes the combination streamable.

        Args:
            predictions: Shape `(n,)`, detached, float32 or wider: some poses of a group, not all.
            **arguments: As for `forward`, except that a tensor with `N` rows is passed as the `n` rows of these poses.

        Returns:
            The declaration for these poses, or None (the default) if the coefficients have no such form.
        """
        del predictions, arguments
        return None


class GradientCombination(Combination):
    """Combine the predictions and also the gradients of the poses: clipping, voting, conflict resolution.

    It needs the gradient of every pose, N copies of the gradients, which only the accumulator `store` keeps. The
    accumulator `auto` selects it for these combinations.
    """

    def combine_gradients(
        self, gradients: Mapping[str, Tensor], predictions: Tensor, coefficients: Tensor
    ) -> Mapping[str, Tensor]:
        """Compute the gradients that are added to `.grad`.

        Plain training uses `einsum("n, n ... -> ...", coefficients, gradient)` for each of them.

        Args:
            gradients: `dy_i/dtheta` of each leaf that any pose reaches, shape `(N, *leaf)`, float32 or wider, zeros for
                the poses that do not reach it. Parameters are named as in the model, pose inputs that require grad
                are named `"input 0"`, `"input 1"`, ...
            predictions: Shape `(N,)`.
            coefficients: `dL/dy_i`, shape `(N,)`, float32 or wider.

        Returns:
            One gradient of shape `(*leaf)` for each name in `gradients`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define combine_gradients")


@dataclass(frozen=True)
class BoundCombination:
    """Bind a combination to the keyword arguments of one call.

    Attributes:
        combination: A `Combination`, or any callable.
        count: N, the number of poses in the group.
        arguments: Keyword arguments of the user's call.
    """

    combination: Callable[..., Tensor]
    count: int
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the combination in messages."""
        return getattr(self.combination, "__name__", type(self.combination).__name__)

    @property
    def combine_gradients(self) -> Callable[..., Mapping[str, Tensor]] | None:
        """The method `combine_gradients` of the combination, or None if it has none."""
        return getattr(self.combination, "combine_gradients", None)

    def __call__(self, predictions: Tensor, selected: Tensor | None = None) -> Tensor:
        """Combine the predictions, shape `(N, *prediction)`, or those where `selected`, boolean `(N,)`, is true."""
        predictions = predictions.to(at_least_float32(predictions.dtype))
        if selected is None:
            return self.combination(predictions, **self.arguments)
        return self.combination(predictions[selected], **self._arguments_of(selected))

    def declare(self, predictions: Tensor, start: int) -> StreamWeights | None:
        """Return the declaration for the predictions, shape `(n,)`, of the poses `start .. start + n - 1`."""
        stream_weights = getattr(self.combination, "stream_weights", None)
        if stream_weights is None:
            return None
        declaration: StreamWeights | None = stream_weights(
            predictions.to(at_least_float32(predictions.dtype)),
            **self._arguments_of(slice(start, start + len(predictions))),
        )
        return declaration

    def _arguments_of(self, selected: Tensor | slice) -> dict[str, Any]:
        return {name: self._select(argument, selected) for name, argument in self.arguments.items()}

    def _select(self, argument: Any, selected: Tensor | slice) -> Any:
        has_row_per_pose = isinstance(argument, Tensor) and argument.dim() > 0 and len(argument) == self.count
        return argument[selected] if has_row_per_pose else argument

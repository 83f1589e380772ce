"""The contract of a combination plugin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gradhooks.combined import Combined, result_of
from gradhooks.errors import PredictionError
from gradhooks.group_index import GroupIndex
from gradhooks.group_loop import accepts_empty_groups, combine_groups, loop_over_groups, name_of
from gradhooks.numerics import widened
from gradhooks.row_arguments import row_arguments, rows_of, rows_of_arguments, rows_on_device


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
    to both methods. Tensors with a row per pose come on the device of the predictions, unless they require grad.

    Optional attributes of a subclass:

    - `accepts_empty_groups = True`: groups without poses are allowed, and `forward` also gets predictions of shape
      `(0, *prediction)`.
    - `api_version = 1`: the version of this contract that the class was written for.
    - `expected_failures`: a mapping from the name of a conformance check to the reason why the class does not pass it.
    - `example(count)`: a method that returns predictions of shape `(count, *prediction)` for the conformance checks, or
      a tuple of these and of the keyword arguments of a call; needed where arbitrary real numbers are not valid.
    - `example_options`: a mapping of constructor options with which the conformance checks create the class by its
      name; needed where an option is required.
    """

    accepts_empty_groups: ClassVar[bool] = False

    def forward(self, predictions: Tensor, *_: Any, **arguments: Any) -> Tensor | Combined:
        """Combine the predictions of a group.

        Args:
            predictions: Shape `(N, *prediction)`, float32 or wider, in the order of the poses.
            **arguments: Keyword arguments of the user's call.

        Returns:
            Shape `(*prediction)` by convention, so that a loss written for one pose applies to a group. Other shapes
            are allowed. A `Combined` with it and further tensors, where the combination computes some.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(predictions)")

    def forward_groups(
        self, predictions: Tensor, groups: Tensor, count: int, *_: Any, **arguments: Any
    ) -> Tensor | Combined:
        """Combine all groups of a batch; override it to do so in a few kernels.

        It must return what `forward` returns for each group, which is also the default. It is called for a batch of
        groups only, and only if it belongs to `forward`: a subclass that replaces `forward` gets the loop.

        Args:
            predictions: Shape `(M, *prediction)`, float32 or wider, in the order of the poses.
            groups: The group of each pose, shape `(M,)`, int64, on the device of the predictions, in any order.
            count: B, the number of groups. All have poses, unless `accepts_empty_groups` is true.
            **arguments: As for `forward`; a tensor with `M` rows has one per pose.

        Returns:
            Shape `(B, *prediction)`.
        """
        names = row_arguments(arguments, len(predictions))
        return loop_over_groups(self, predictions, GroupIndex(groups.cpu(), count), arguments, names)

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
    """Bind a combination to the keyword arguments, and the groups, of one call.

    Attributes:
        combination: A `Combination`, any callable, or None, with which the result is the predictions themselves.
        count: The number of poses, of all groups together.
        arguments: Keyword arguments of the user's call. Tensors with `count` rows have a row per pose.
        groups: The group of each pose, or None for one group, whose result has no axis for groups.
    """

    combination: Callable[..., Any] | None
    count: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    groups: GroupIndex | None = None

    @property
    def name(self) -> str:
        """The name of the combination in messages."""
        return name_of(self.combination)

    @property
    def accepts_empty_groups(self) -> bool:
        """Whether a group may have no poses."""
        return accepts_empty_groups(self.combination)

    @property
    def combine_gradients(self) -> Callable[..., Mapping[str, Tensor]] | None:
        """The method `combine_gradients` of the combination, or None if it has none. It gets one group."""
        return getattr(self.combination, "combine_gradients", None)

    def __call__(self, predictions: Tensor, selected: Tensor | None = None) -> Tensor:
        """Combine the predictions, and return the result alone; see `combine`."""
        return result_of(self._combine(predictions, selected))

    def combine(self, predictions: Tensor, selected: Tensor | None = None) -> Tensor | Combined:
        """Combine the predictions.

        Args:
            predictions: Shape `(M, *prediction)`.
            selected: Which poses to combine: boolean, shape `(M,)`, or, without groups, indices; all by default.

        Returns:
            Shape `(B, *prediction)` with groups, `(*prediction)` without, and `predictions` without a combination; in a
            `Combined` if the combination returns one.

        Raises:
            PredictionError: No pose of a group is selected, and the combination does not accept empty groups.
            CombinationError: The result does not have one row per group.
        """
        combined = self._combine(predictions, selected)
        if selected is None or isinstance(combined, Tensor):
            return combined
        return combined.with_all_poses(selected)

    def _combine(self, predictions: Tensor, selected: Tensor | None) -> Tensor | Combined:
        if self.combination is None:
            return predictions
        predictions = widened(predictions)
        groups, arguments = self.groups, self._arguments_on(predictions.device)
        names = row_arguments(arguments, self.count)
        if selected is not None:
            rows = selected.cpu().nonzero().squeeze(1) if selected.dtype == torch.bool else selected
            if groups is not None:
                self._refuse_lost_groups(groups, groups.select(rows))
                groups = groups.select(rows)
            predictions, arguments = rows_of(predictions, rows), rows_of_arguments(arguments, self.count, rows)
        if groups is None:
            combined: Tensor | Combined = self.combination(predictions, **arguments)
            return combined
        return combine_groups(self.combination, predictions, groups, arguments, names)

    def _refuse_lost_groups(self, groups: GroupIndex, left: GroupIndex) -> None:
        if self.accepts_empty_groups:
            return
        for number, (size, remaining) in enumerate(zip(groups.sizes, left.sizes, strict=True)):
            if not remaining:
                raise PredictionError(
                    f"group {number}: none of its {size} predictions is finite, so none is left, and the combination "
                    f"{self.name} does not accept empty groups"
                )

    def declare(self, predictions: Tensor, start: int) -> StreamWeights | None:
        """Return the declaration for the predictions, shape `(n,)`, of the poses `start .. start + n - 1`.

        They may be of several groups, since row `i` depends on prediction `i` only.
        """
        stream_weights = getattr(self.combination, "stream_weights", None)
        if stream_weights is None:
            return None
        arguments = self._arguments_on(predictions.device)
        declaration: StreamWeights | None = stream_weights(
            widened(predictions),
            **(rows_of_arguments(arguments, self.count, slice(start, start + len(predictions))) if arguments else {}),
        )
        return declaration

    def _arguments_on(self, device: torch.device) -> Mapping[str, Any]:
        """Return the arguments for predictions on a device, moved once in a batch, not with every chunk."""
        if not self.arguments or not isinstance(self.combination, Combination):
            return self.arguments
        if device not in self._moved:
            self._moved[device] = rows_on_device(self.arguments, self.count, device)
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, dict[str, Any]]:
        return {}

"""The contract of a combination plugin."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    """

    def forward(self, predictions: Tensor) -> Tensor:
        """Combine a group.

        Args:
            predictions: Shape `(N, *prediction)`, float32 or wider, in the order of the poses.

        Returns:
            Shape `(*prediction)` by convention, so that loss code for one pose serves a group; anything goes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(predictions)")

    def stream_weights(self, predictions: Tensor) -> StreamWeights | None:
        """Declare how the coefficients depend on each prediction, which makes the combination streamable.

        Args:
            predictions: Shape `(n,)`, detached, float32 or wider: some poses of a group, not all.

        Returns:
            The declaration for those poses, or None (the default) where there is none.
        """
        del predictions
        return None

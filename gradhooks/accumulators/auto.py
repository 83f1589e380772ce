"""Choose the cheapest exact accumulator for each group."""

import math

import torch
from loguru import logger
from torch import Tensor

from gradhooks.accumulators.base import Accumulator, Coefficients, Ledger
from gradhooks.accumulators.declaration import declared
from gradhooks.accumulators.recompute import Recompute
from gradhooks.accumulators.store import Store
from gradhooks.accumulators.stream import Stream
from gradhooks.group import Group

# A graphless forward costs about a quarter of a step: 0.15 for SchNet, 0.29 for a transformer and a CNN (measured).
FORWARD_SHARE = 0.25
# Costs this close are alike: do not change for less.
INERTIA = 1.1
# How much of what is remembered gives way to the newest group.
FORGETTING = 0.3


class Auto(Accumulator):
    """Streams where that can be done and earlier groups show that it is cheaper, recomputes elsewhere.

    Of the poses of a group let b be the share whose weight mattered when it came, k the share that mattered in the end,
    and r the share that the loss reads beside the combination. With a graphless forward costing f of a step, streaming
    costs f + b (1 - f) + r steps a pose and recomputing f + max(k, r). A declaration that weighs all poses alike has
    b = k = 1, and no group need be seen. Else the first group is recomputed: that is never far off, while streaming is
    where every pose sets a new record.
    """

    name = "auto"
    recomputes = True

    def __init__(self) -> None:
        self._came = self._stayed = 1.0
        self._direct = 0.0
        self._groups = 0
        self._streams = False

    def open(self, group: Group, predictions: Tensor) -> Ledger:
        if group.combination.combine_gradients is not None:
            group.report.reason = "the combination works on the poses' gradients"
            return self._chosen(Store(), group, predictions)
        declaration = declared(group, predictions)
        if declaration is None:
            return self._chosen(Stream(), group, predictions)  # hands over to recompute, and says why
        group.finished.append(self._learn)
        self._decide(declaration.uniform)
        group.report.reason = self._reason(declaration.uniform)
        return self._chosen(Stream() if self._streams else Recompute(), group, predictions)

    @staticmethod
    def _chosen(accumulator: Accumulator, group: Group, predictions: Tensor) -> Ledger:
        group.report.accumulator = accumulator.name
        ledger = accumulator.open(group, predictions)
        logger.debug("{} poses by {}: {}", group.report.poses, group.report.accumulator, group.report.reason)
        return ledger

    def _decide(self, uniform: bool) -> None:
        if self._groups == 0:
            self._streams = uniform
            return
        streamed = FORWARD_SHARE + self._came * (1 - FORWARD_SHARE) + self._direct
        recomputed = FORWARD_SHARE + max(self._stayed, self._direct)
        margin = 1 / INERTIA if self._streams else INERTIA
        self._streams = streamed * margin <= recomputed

    def _reason(self, uniform: bool) -> str:
        if self._groups == 0:
            return "every pose weighs the same" if uniform else "nothing is known yet of how many poses matter"
        return (
            f"in earlier groups {self._came:.0%} of the poses mattered when they came, {self._stayed:.0%} in the end, "
            f"and {self._direct:.0%} were read by the loss beside the combination"
        )

    def _learn(self, group: Group, predictions: Tensor, coefficients: Coefficients) -> None:
        declaration = declared(group, predictions)
        if declaration is None:
            return
        weights = torch.tensor(declaration.log_weights, dtype=torch.float64).nan_to_num(nan=math.inf)
        least = math.log(group.negligible(predictions.dtype) or torch.finfo(torch.float64).tiny)
        came = (weights >= weights.cummax(0).values + least).double().mean().item()
        stayed = (weights >= weights.max() + least).double().mean().item()
        direct = 0.0 if coefficients.direct is None else (coefficients.direct != 0).double().mean().item()
        newest = 1.0 if self._groups == 0 else FORGETTING
        self._came += newest * (came - self._came)
        self._stayed += newest * (stayed - self._stayed)
        self._direct += newest * (direct - self._direct)
        self._groups += 1

"""The attribute `learned` of a MultiPose: what earlier batches have shown, as plain values, to be saved."""

from collections.abc import Mapping
from typing import Any

from gradhooks.accumulators.base import Accumulator
from gradhooks.engine.learned import Learned


class LearnedAttribute:
    """An object that learns from batch to batch, and so does its accumulator."""

    _learned: Learned
    _accumulator: Accumulator

    @property
    def learned(self) -> dict[str, Any]:
        """What earlier batches have shown: memory needs, chunk sizes, which accumulator is cheapest.

        A small dictionary of plain values, which `torch.load(weights_only=True)` reads. Save it beside the state dict
        and assign it when a run is resumed: the rest of the run then has the same bits as without the interruption.

        Raises:
            TypeError: What is assigned is no such dictionary.
        """
        accumulator = {"name": self._accumulator.name, **self._accumulator.learned()}
        return {**self._learned.as_plain_values(), "accumulator": accumulator}

    @learned.setter
    def learned(self, values: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping) or "accumulator" not in values:
            raise TypeError(f"learned must be what scorer.learned has returned, a dictionary, got {values!r}")
        accumulator = dict(values["accumulator"])
        self._learned = Learned.of_plain_values(values)
        if accumulator.pop("name") == self._accumulator.name and accumulator:  # another one has learned nothing
            self._accumulator.learn_from(accumulator)

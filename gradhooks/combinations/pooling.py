"""Pooling: a pooling module from another library as a combination."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from gradhooks.combination import Combination
from gradhooks.combinations.padded_groups import PaddedGroups
from gradhooks.combinations.pooling_module import (
    CallArguments,
    ModuleOutput,
    dtype_of,
    marks_padding,
    mask_argument,
    separate,
    takes_group_index,
)
from gradhooks.combinations.pooling_trial import Trial, pose_axes, try_groups
from gradhooks.combined import Combined
from gradhooks.errors import CombinationError
from gradhooks.group_index import GroupIndex
from gradhooks.group_loop import loop_over_groups
from gradhooks.group_reductions import expand_groups
from gradhooks.numerics import at_least_float32
from gradhooks.row_arguments import row_arguments


class Pooling(Combination):
    """Combine the predictions of the poses, which are vectors, by a pooling module from another library.

    The module is one of two kinds, which its signature shows:

    - It takes bags of shape `(B, N, features)`, and perhaps a mask of shape `(B, N)`, as those of torchmil do. A group
      is a bag.
    - It takes `(x, index, dim_size=)`, as the aggregations of PyTorch Geometric do. `x` is sorted by group.

    What a module returns beside its result is kept: `prediction.outputs`, and `prediction.attention` for the first of
    them with a row per pose. The parameters of the module are trained with those of the model.

    >>> scorer = gradhooks.MultiPose(encoder, Pooling(torchmil.models.ABMIL((16,)), return_att=True))
    >>> scorer(patches, groups=slide).attention  # (M,)

    A batch of groups is one call of the module where it takes the groups or a mask, if a trial with random numbers
    shows that each group then has the result and the derivatives that it has alone. Otherwise there is one call for
    each group: for modules without a mask, those that read the padding, dropout and batch normalization in training.

    Args:
        module: The pooling module.
        mask: The name of its argument for the mask; "auto" finds `mask`, `attention_mask`, `key_padding_mask` and the
            like; None passes none. The mask is true at poses, or at padding if its name contains "padding".
        result: Which item of what the module returns is the combined prediction, if it returns a tuple (by default the
            first) or a mapping.
        **arguments: Passed in each call of the module, such as `return_att=True`. Keyword arguments of the user's call
            are passed, too; those with a row per pose with an axis for the bags.

    Raises:
        TypeError: `module` is no module.
        CombinationError: The module has no argument for a mask of the given name. In a call: the module returns
            something else than a tensor first, or cannot combine a group without poses.
    """

    def __init__(
        self, module: nn.Module, *, mask: str | None = "auto", result: str | int | None = None, **arguments: Any
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"Pooling: module must be an instance of torch.nn.Module, got {module!r}")
        self.module = module
        self.takes_groups = takes_group_index(module)
        self.mask = None if self.takes_groups else mask_argument(module, mask)
        self.result = result
        self.arguments = arguments
        self._trials: dict[Any, Trial] = {}

    @property
    def accepts_empty_groups(self) -> bool:  # type: ignore[override]
        """Whether a group may have no poses: where the module takes the groups, it says what an empty one gives."""
        return self.takes_groups

    def forward(self, predictions: Tensor, **arguments: Any) -> Tensor | Combined:
        own = CallArguments(arguments, row_arguments(arguments, len(predictions)))
        output = self.call_for_group(predictions, own)
        axes = self._trial(predictions, own).axes if output.others else ()
        return self._without_first_axis(output, axes, len(predictions))

    def forward_groups(self, predictions: Tensor, groups: Tensor, count: int, **arguments: Any) -> Tensor | Combined:
        own = CallArguments(arguments, row_arguments(arguments, len(predictions)))
        trial = self._trial(predictions, own)
        if trial.together and len(predictions):
            return self.forward_together(predictions, groups, count, own, trial.axes)

        def combine(rows: Tensor, **arguments: Any) -> Tensor | Combined:
            return self.forward_alone(rows, CallArguments(arguments, own.names), trial.axes)

        combine.__name__ = f"Pooling of {type(self.module).__name__}"
        return loop_over_groups(combine, predictions, GroupIndex(groups.cpu(), count), arguments, own.names)

    def forward_alone(self, predictions: Tensor, arguments: CallArguments, axes: Sequence[int]) -> Tensor | Combined:
        """Combine one group, shape `(N, *prediction)`; `axes` as for `forward_together`."""
        return self._without_first_axis(self.call_for_group(predictions, arguments), axes, len(predictions))

    def forward_together(
        self, predictions: Tensor, groups: Tensor, count: int, arguments: CallArguments, axes: Sequence[int]
    ) -> Tensor | Combined:
        """Combine all groups in one call of the module.

        Args:
            predictions: Shape `(M, *prediction)`.
            groups: Shape `(M,)`.
            count: B.
            arguments: Keyword arguments of the user's call.
            axes: The axis of the poses in each tensor that the module returns beside its result, 0 for none.
        """
        if self.takes_groups:
            order = groups.argsort(stable=True)  # several aggregations need sorted groups, and none minds them
            rows = arguments.map_rows(lambda value: value[order.to(value.device)])
            result, others = self._call_with_groups(expand_groups(predictions, order), groups[order], count, rows)
            places = order.argsort()
            pairs = zip(others, axes, strict=True)
            return _combined(result, [expand_groups(other, places) if axis else other for other, axis in pairs], axes)
        padded = PaddedGroups(GroupIndex(groups.cpu(), count), predictions.device)
        bags = arguments.map_rows(padded.pad)
        result, others = self._call_with_bags(padded.pad(predictions), padded.mask, bags)
        pairs = zip(others, axes, strict=True)
        return _combined(
            result, [padded.unpad(other.movedim(axis, 1)) if axis else other for other, axis in pairs], axes
        )

    def call_for_group(self, predictions: Tensor, arguments: CallArguments) -> ModuleOutput:
        """Call the module for one group, shape `(N, *prediction)`; its output gets an axis of length 1 in front."""
        if not self.takes_groups:
            valid = torch.ones(1, len(predictions), dtype=torch.bool, device=predictions.device)
            bag = arguments.map_rows(lambda value: value.unsqueeze(0))
            return self._call_with_bags(predictions.unsqueeze(0), valid, bag)
        if len(predictions) == 0:
            return self._call_without_poses(predictions, arguments)
        index = torch.zeros(len(predictions), dtype=torch.int64, device=predictions.device)
        result, others = self._call_with_groups(predictions, index, 1, arguments)
        return ModuleOutput(result, [other.unsqueeze(0) for other in others])

    def _call_without_poses(self, predictions: Tensor, arguments: CallArguments) -> ModuleOutput:
        """Combine an empty group beside one with poses: not every aggregation takes no poses at all."""
        trial = self._trial(predictions, arguments)
        if not trial.together:
            raise CombinationError(
                f"Pooling: {type(self.module).__name__} combines one group at a time, because {trial.reason}, and a "
                "group has no poses; leave out groups without poses"
            )
        poses = torch.zeros(2, dtype=torch.int64, device=predictions.device)  # one is too few for a median
        rows = arguments.map_rows(lambda value: value.new_zeros(2, *value.shape[1:]))
        beside = predictions.new_zeros(2, *predictions.shape[1:])
        result, others = self._call_with_groups(beside, poses, 2, rows)
        empty = [other[:0] if axis else other[1:] for other, axis in zip(others, trial.axes, strict=True)]
        return ModuleOutput(result[1:], [other.unsqueeze(0) for other in empty])

    def _call_with_groups(
        self, predictions: Tensor, groups: Tensor, count: int, arguments: CallArguments
    ) -> ModuleOutput:
        named = {**arguments.values, "index": groups, "dim_size": count}
        if predictions.dim() > 2:  # noqa: PLR2004 - their default is the axis before the last one
            named["dim"] = 0
        return self._run(predictions, named, is_vector=predictions.dim() > 1)

    def _call_with_bags(self, bags: Tensor, valid: Tensor, arguments: CallArguments) -> ModuleOutput:
        named = dict(arguments.values)
        if self.mask is not None:
            given = named.get(self.mask)
            if marks_padding(self.mask):
                named[self.mask] = ~valid if given is None else ~valid | given.to(valid)
            else:
                named[self.mask] = valid if given is None else valid & given.to(valid)
        return self._run(bags, named, is_vector=bags.dim() > 2)  # noqa: PLR2004

    def _run(self, inputs: Tensor, arguments: Mapping[str, Any], *, is_vector: bool) -> ModuleOutput:
        """Call the module; predictions of one number get an axis for features, and lose it afterwards."""
        inputs = inputs.to(dtype_of(self.module) or inputs.dtype)  # predictions were widened in a bfloat16 model
        output = self.module(inputs if is_vector else inputs.unsqueeze(-1), **{**self.arguments, **arguments})
        result, others = separate(output, self.result, type(self.module).__name__)
        if not is_vector and result.dim() > 1 and result.shape[-1] == 1:
            result = result.squeeze(-1)
        return ModuleOutput(result.to(at_least_float32(result.dtype)), others)

    def _without_first_axis(self, output: ModuleOutput, axes: Sequence[int], size: int) -> Tensor | Combined:
        """Return the output for one group of `size` poses; `axes` are inferred if none are known."""
        axes = axes or pose_axes([output.others], [size])
        rows = []
        for other, axis in zip(output.others, axes, strict=True):
            row = other.movedim(axis, 1) if axis else other
            row = row[0] if row.dim() and len(row) == 1 else row
            rows.append(row[0] if self.takes_groups and not axis else row)
        return _combined(output.result[0], rows, axes)

    def _trial(self, predictions: Tensor, arguments: CallArguments) -> Trial:
        """Return what the trial has shown: the first one in this mode, for predictions of this shape."""
        flags = tuple([module.training for module in self.module.modules()])
        key = (flags, predictions.shape[1:], tuple(sorted(arguments.values)))
        if key not in self._trials:
            self._trials[key] = trial = try_groups(self, predictions, arguments)
            if not trial.together:
                logger.debug("{} gets one group at a time: {}", type(self.module).__name__, trial.reason)
        return self._trials[key]

    def extra_repr(self) -> str:
        named = {"mask": self.mask, "result": self.result, **self.arguments}
        return ", ".join(f"{name}={value!r}" for name, value in named.items() if value is not None)


def _combined(result: Tensor, others: Sequence[Tensor], axes: Sequence[int]) -> Tensor | Combined:
    if not others:
        return result
    pairs = list(zip(others, axes, strict=True))
    return Combined(
        result, tuple(other for other, axis in pairs if axis), tuple(other for other, axis in pairs if not axis)
    )

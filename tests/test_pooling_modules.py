"""Pooling: what it finds out about a module, what it passes to it, and what it makes of the output."""

import copy
import gc
import pickle
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from model_zoo import TensorFactory
from pooling_heads import FEATURES, INDEX, aggregations
from torch import Tensor, nn

import gradhooks
from gradhooks.combination import BoundCombination
from gradhooks.combinations import Pooling
from gradhooks.combinations.pooling_module import CallArguments
from gradhooks.combined import Combined
from gradhooks.errors import CombinationError
from gradhooks.group_index import GroupIndex
from gradhooks.group_reductions import group_softmax, group_sum
from gradhooks.prediction import MultiPosePrediction, combine
from gradhooks.testing import check_combination

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
GROUPS = GroupIndex(torch.tensor(INDEX), 3)


class Attention(nn.Module):
    """Weights the instances; returns the result, the weights, a number per class and all pairs of instances."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.score, self.classes = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 4)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[torch.Size] = []

    def weights(self, bags: Tensor, ignored: Tensor) -> Tensor:
        scores: Tensor = self.score(self.dropout(bags)).squeeze(-1)
        return scores.masked_fill(ignored, -torch.inf).softmax(1)

    def forward(self, bags: Tensor, mask: Tensor) -> Any:
        self.calls.append(bags.shape)
        weights = self.weights(bags, ~mask)
        result = torch.einsum("bn,bnf->bf", weights, bags)
        return result, self.classes(result), [weights.unsqueeze(1), {"pairs": bags @ bags.mT}]


class PaddingMask(Attention):
    """Takes a mask that is true at padding, and further arguments."""

    def forward(self, bags: Tensor, bias: Any = 0.0, *, scale: float = 1.0, key_padding_mask: Any = None) -> Any:
        self.calls.append(bags.shape)
        weights = self.weights(bags + bias, key_padding_mask)
        return {"attention": weights, "pooled": scale * torch.einsum("bn,bnf->bf", weights, bags)}


class IgnoresMask(Attention):
    """Averages the padding, too."""

    def forward(self, bags: Tensor, mask: Tensor) -> Any:  # noqa: ARG002
        self.calls.append(bags.shape)
        return bags.mean(1)


class AggregationWithWeights(Attention):
    """Takes all groups; returns the result, a number per group and the weights of the poses."""

    def forward(self, x: Tensor, index: Tensor, dim_size: int, scale: Any, bias: Any) -> Any:
        self.calls.append(x.shape)
        assert (index.diff() >= 0).all()
        weights = group_softmax(self.score(x + bias).squeeze(-1), index, dim_size)
        result = group_sum(weights[:, None] * x, index, dim_size) * scale
        return result, self.classes(result)[:, 0], weights


class Statistics(Attention):
    """Changes all that a trial must leave as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, bags: Tensor, mask: Tensor) -> Any:  # noqa: ARG002
        self.seen += 1
        return bags.sum(1) * (torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002, S311


def pool(combination: Pooling, predictions: Tensor, groups: GroupIndex | None = GROUPS, **arguments: Any) -> Any:
    bound = BoundCombination(combination, len(predictions), arguments, groups)
    return combine(bound, predictions, predictions, "propagate")


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def rows_of(values: Tensor) -> list[Tensor]:
    return list(GROUPS.split(values))


def test_outputs_of_every_shape(double: TensorFactory) -> None:
    """All pairs of instances have no common shape, which rules out one call for all groups."""
    module = Attention().to(double.device, double.dtype)
    pooling, predictions = Pooling(module), double.randn(len(INDEX), FEATURES)
    prediction = pool(pooling, predictions)
    alone = [
        module(rows[None], torch.ones(1, len(rows), dtype=torch.bool, device=rows.device))
        for rows in rows_of(predictions)
    ]
    (weights, pairs), (classes,) = prediction.outputs.per_pose, prediction.outputs.per_group
    close(classes, torch.cat([part[1] for part in alone]))
    close(rows_of(prediction.attention), [part[2][0][0].mT for part in alone])
    assert weights is prediction.attention
    close(pairs, tuple(part[2][1]["pairs"][0] for part in alone))
    single = pool(pooling, predictions[:4], None)  # as many poses as classes
    assert [output.shape for output in single.outputs.per_pose] == [(4, 1), (4, 4)]
    assert [output.shape for output in single.outputs.per_group] == [(4,)]


def test_a_mask_of_padding_and_arguments_of_a_call(double: TensorFactory) -> None:
    module = PaddingMask().to(double.device, double.dtype)
    pooling = Pooling(module, result="pooled", scale=3.0)
    predictions, bias = double.randn(2, len(INDEX), FEATURES)
    keep = torch.tensor(
        [number != 3 for number in range(len(INDEX))], device=double.device
    )  # not the last of its group
    pool(pooling, predictions, bias=bias, key_padding_mask=~keep)
    module.calls.clear()
    prediction = pool(pooling, predictions, bias=bias, key_padding_mask=~keep)
    assert module.calls == [(3, 4, FEATURES)]
    for rows, bias_rows, kept, combined, attention in zip(
        *map(rows_of, (predictions, bias, keep)), prediction.combined, rows_of(prediction.attention), strict=True
    ):
        weights = module.weights((rows + bias_rows)[kept][None], torch.zeros(1, dtype=torch.bool, device=rows.device))[
            0
        ]
        close(combined, 3 * weights @ rows[kept])
        close(attention[kept], weights)
        assert not attention[~kept].any()


@pytest.mark.parametrize("module", [IgnoresMask, Attention])
def test_a_module_that_would_mix_groups_gets_one_at_a_time(module: type[Attention], double: TensorFactory) -> None:
    pooling = Pooling(module().to(double.device, double.dtype))
    pool(pooling, double.randn(len(INDEX), FEATURES))
    assert pooling.module.calls == [(1, size, FEATURES) for size in GROUPS.sizes]
    (trial,) = pooling._trials.values()
    assert "of a group depends on the other groups, on the padding, or on chance" in trial.reason


def test_a_module_that_fails_raises_its_own_error(double: TensorFactory) -> None:
    """What fails in the trial fails again in the loop, where the user sees it."""
    pooling = Pooling(nn.Linear(FEATURES + 1, 2).to(double.device, double.dtype))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pool(pooling, double.randn(len(INDEX), FEATURES))
    with pytest.raises(
        CombinationError, match=r"Pooling of Flatten returned shape \(2, 2\) for group 1 .* one shape for every group"
    ):
        pool(Pooling(nn.Flatten(2)), double.randn(len(INDEX), 2, 1))


def test_each_mode_has_its_trial(double: TensorFactory) -> None:
    """Dropout draws for each group in training; without it, all groups are one call."""
    module = PaddingMask(dropout=0.5).to(double.device, double.dtype)
    pooling, predictions = Pooling(module, result="pooled"), double.randn(len(INDEX), FEATURES)
    calls = []
    for mode in (True, False, True):
        pooling.train(mode)
        with torch.inference_mode(not mode):
            pool(pooling, predictions)
        calls.append(len(module.calls))
        module.calls.clear()
    assert calls == [3, 1, 3]


def test_a_trial_leaves_no_trace(double: TensorFactory) -> None:
    module = Statistics().to(double.device, double.dtype)
    predictions = double.randn(2, FEATURES)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index] # noqa: NPY002
    with torch.autocast("cpu", torch.bfloat16):
        Pooling(module)._trial(predictions, CallArguments({}, set()))
    assert (module.seen.item(), module.calls) == (0, [])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index] # noqa: NPY002
    assert all(parameter.grad is None for parameter in module.parameters())


def test_predictions_of_one_number(double: TensorFactory) -> None:
    for name in ("mean", "median"):
        pooling, predictions = Pooling(aggregations()[name].make()), double.randn(len(INDEX))
        combined = pool(pooling, predictions).combined
        reduce = torch.mean if name == "mean" else lambda rows: rows.median(0).values
        close(combined, torch.stack([reduce(rows) for rows in rows_of(predictions)]))
        close(pool(pooling, predictions, None).combined, reduce(predictions))


def test_an_aggregation_that_returns_more_than_its_result(double: TensorFactory) -> None:
    module = AggregationWithWeights().to(double.device, double.dtype)
    pooling, (predictions, bias) = Pooling(module), double.randn(2, len(INDEX), FEATURES)
    arguments = {"bias": bias, "scale": double.randn(1)}
    module.calls.clear()
    prediction = pool(pooling, predictions, **arguments)
    assert module.calls == [predictions.shape]
    (classes,) = prediction.outputs.per_group
    for number, (rows, bias_rows) in enumerate(zip(rows_of(predictions), rows_of(bias), strict=True)):
        alone = pool(pooling, rows, None, bias=bias_rows, scale=arguments["scale"])
        close(alone.combined, prediction.combined[number])
        close(alone.attention, prediction.attention[GROUPS.index == number])
        close(alone.outputs.per_group, (classes[number],))
    empty = pool(pooling, predictions[:0], GroupIndex(GROUPS.index[:0], 1), bias=bias[:0], scale=arguments["scale"])
    assert (empty.attention.shape, empty.combined.tolist()) == ((0,), [[0.0] * FEATURES])


def test_arguments_that_are_as_long_as_a_group(double: TensorFactory) -> None:
    """An argument without a row per pose reaches the module as it is, also where each group is a call."""
    module = TakesTable().to(double.device, double.dtype)
    table = double.randn(GROUPS.sizes[0], FEATURES)
    pool(Pooling(module), double.randn(len(INDEX), FEATURES), table=table)
    assert module.tables == [table.shape] * 3


def test_empty_groups(double: TensorFactory) -> None:
    """The aggregation itself says what an empty group gives, as in a call for all groups by hand."""
    sorted_index, order = GROUPS.index.sort(stable=True)
    for name, head in aggregations().items():
        module = head.make().to(double.device, double.dtype)
        predictions = double.randn(len(INDEX), FEATURES).requires_grad_()
        groups = GroupIndex(GROUPS.index, 5)
        if not head.together:
            with pytest.raises(
                CombinationError, match=r"LSTMAggregation combines one group at a time, because .* leave"
            ):
                pool(Pooling(module), predictions, groups)
            continue
        combined = pool(Pooling(module), predictions, groups).combined
        close(combined, module(predictions[order], sorted_index.to(order.device), dim_size=5))
        close(pool(Pooling(module), predictions[:0], GroupIndex(GROUPS.index[:0], 1)).combined, combined[3:4])
        gradients = torch.autograd.grad(combined.square().sum(), [predictions, *module.parameters()], allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients), name


def test_dropped_poses_have_no_attention(double: TensorFactory) -> None:
    pooling = Pooling(PaddingMask().to(double.device, double.dtype), result="pooled")
    predictions = double.randn(len(INDEX), FEATURES)
    predictions[[1, 7]] = torch.nan
    bound = BoundCombination(pooling, len(predictions), {}, GROUPS)
    prediction = combine(bound, predictions, predictions, "drop")
    assert prediction.attention.isnan().nonzero().flatten().tolist() == [1, 7]
    for attention in rows_of(prediction.attention):
        close(attention.nansum(), torch.ones_like(attention[0]))
    assert prediction.coefficients().shape == predictions.shape


def test_rebuilt_and_copied_predictions_keep_their_attention(double: TensorFactory) -> None:
    """Accelerate rebuilds predictions from their fields; the graph of a prediction that nobody has left is freed."""
    model = nn.Linear(5, FEATURES).to(double.device, double.dtype)
    pooling = Pooling(PaddingMask().to(double.device, double.dtype), result="pooled")
    scorer = gradhooks.MultiPose(model, pooling)
    prediction = scorer(double.randn(len(INDEX), 5), groups=INDEX)
    rebuilt = MultiPosePrediction(*prediction)
    assert rebuilt.attention is prediction.attention
    assert prediction._replace(combined=prediction.combined.clone()).attention is prediction.attention
    with torch.no_grad():
        plain = scorer(double.randn(len(INDEX), 5), groups=INDEX)
    close(pickle.loads(pickle.dumps(plain)).attention, plain.attention)  # noqa: S301
    close(copy.deepcopy(plain).attention, plain.attention)
    alive = weakref.ref(prediction.outputs)  # never run backward
    del prediction, rebuilt
    gc.collect()
    assert alive() is None


def test_what_does_not_fit_is_refused(double: TensorFactory) -> None:
    predictions = double.randn(4, FEATURES)
    with pytest.raises(TypeError, match=r"Pooling: module must be an instance of torch\.nn\.Module, got <function"):
        Pooling(vectors)  # type: ignore[arg-type]
    with pytest.raises(
        CombinationError, match=r"Linear\.forward has no argument 'padding' for the mask; it takes input$"
    ):
        Pooling(nn.Linear(1, 1), mask="padding")
    module = PaddingMask().to(double.device, double.dtype)
    with pytest.raises(
        CombinationError, match=r"PaddingMask returned 'attention', 'pooled', of which None is no tensor"
    ):
        pool(Pooling(module), predictions, None)
    with pytest.raises(
        CombinationError, match=r"of which 'result' is no tensor; choose .* with Pooling\(module, result"
    ):
        pool(Pooling(module, result="result"), predictions, None)
    with pytest.raises(CombinationError, match=r"ReturnsPair returned 0, 1, of which 2 is no tensor"):
        pool(Pooling(ReturnsPair(), result=2), predictions, None)
    prediction = pool(Pooling(nn.Linear(FEATURES, 2).to(predictions)), predictions, None)
    for read in (lambda: prediction.outputs, lambda: prediction.attention):
        with pytest.raises(
            AttributeError, match=r"Pooling returned its result alone; .* Pooling\(head, return_att=True\)"
        ):
            read()
    only_groups = MultiPosePrediction(*prediction, prediction._combination, None, Combined(predictions, (), ()))
    with pytest.raises(AttributeError, match="returned no tensor with a row per pose; what it returned is in outputs"):
        _ = only_groups.attention
    with pytest.raises(AttributeError, match=r"lost its combination .*; use outputs where"):
        _ = MultiPosePrediction(predictions.clone(), predictions.clone()).attention


def vectors(count: int) -> Tensor:
    return torch.randn(count, FEATURES)


class TakesTable(nn.Linear):
    def __init__(self) -> None:
        super().__init__(FEATURES, 2)
        self.tables: list[torch.Size] = []

    def forward(self, bags: Tensor, table: Any) -> Any:
        self.tables.append(table.shape)
        return super().forward(bags + table.sum()).sum(1)


class ReturnsPair(nn.Identity):
    def forward(self, bags: Tensor) -> Any:
        return bags, bags


def test_other_precisions_and_compiled_modules(double: TensorFactory) -> None:
    """Predictions are converted to the dtype of the module; a compiled one takes the mask of the module inside."""
    predictions = double.randn(len(INDEX), FEATURES)
    eager = Pooling(PaddingMask().to(double.device, double.dtype), result="pooled")
    compiled = Pooling(torch.compile(eager.module, backend="eager"), result="pooled")
    assert compiled.mask == "key_padding_mask"
    expected = pool(eager, predictions).combined
    close(pool(compiled, predictions).combined, expected)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        combined = pool(eager.to(dtype), predictions).combined
        assert combined.dtype == torch.float32
        torch.testing.assert_close(combined, expected.float(), rtol=0, atol=tolerance)
    assert len(eager._trials) == 1


def test_the_conformance_kit_and_options_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check_combination(Pooling(aggregations()["mean"].make()))
    pooling = Pooling(PaddingMask(), result="pooled")
    del pooling.module.classes  # not used
    pooling.example = vectors  # type: ignore[assignment]
    check_combination(pooling)
    monkeypatch.setattr(gradhooks.registry.combinations, "_registered", {"pooling": Pooling})
    options = {"module": PaddingMask(), "result": "pooled", "scale": 2.0}
    scorer = gradhooks.MultiPose(nn.Linear(5, FEATURES), "pooling", combination_options=options)
    assert {*options["module"].parameters()} < {*scorer.parameters()}  # type: ignore[attr-defined]
    assert "scale=2.0" in str(scorer)

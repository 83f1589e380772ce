"""Pooling modules of other libraries as combinations: gradients, attention, all groups at once or one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import TensorFactory
from pooling_heads import FEATURES, INDEX, Head, aggregations, call_bag, call_set, manual_seeds, torchmil_heads
from torch import Tensor, nn
from training_reference import ACCUMULATORS_AND_PLAIN, case_label, options_of

import gradhooks
from gradhooks.combinations import Pooling

pytestmark = [
    # Importing torch_geometric calls torch.jit.script; torchmil makes a tensor of a numpy scalar.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]
EACH_INDEX: dict[str, list[int] | None] = {"one group": None, "ragged, unsorted": INDEX}
Call = Callable[[nn.Module, dict[str, Any], Tensor], tuple[Tensor, ...]]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, FEATURES)

    def forward(self, poses: Tensor) -> Tensor:
        return self.layer(poses).tanh()  # type: ignore[no-any-return]


def loss_of(combined: Tensor, others: list[Tensor]) -> Tensor:
    """Return a loss of all that a head returns, with another weight for each group and each pose."""
    weights = torch.arange(1, combined[..., None].shape[0] + 1, device=combined.device)
    terms = [torch.einsum("b,b...->", weights.to(combined), combined.square()) if combined.dim() else combined.square()]
    terms += [(other.flatten(1).sum(1) if other.dim() > 1 else other).cos().sum() for other in others]
    return torch.stack(terms).sum()


def native(encoder: nn.Module, head: Callable[[Tensor], tuple[Tensor, ...]], poses: Tensor, index: Any) -> Any:
    """Return the combined predictions and the other outputs, in the order of the poses, by plain PyTorch."""
    rows = encoder(poses)
    if index is None:
        combined, *others = head(rows)
        return combined, others
    groups = torch.tensor(index, device=rows.device)
    parts = [head(rows[groups == group]) for group in range(max(index) + 1)]
    order = groups.argsort(stable=True).argsort()
    combined, *columns = zip(*parts, strict=True)
    return torch.stack(combined), [torch.cat(column)[order] for column in columns]


def gradients_of(*modules: nn.Module) -> dict[str, Tensor | None]:
    return {
        f"{number} {name}": None if parameter.grad is None else parameter.grad.clone()
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }


def assert_equal_to_native(head: Head, call: Call, double: TensorFactory) -> None:
    encoder = Encoder().to(double.device, double.dtype)
    module = head.make().to(double.device, double.dtype)
    pooling = Pooling(module, **head.arguments)
    poses = double.randn(len(INDEX), 5)
    close = torch.testing.assert_close
    for kind, index in EACH_INDEX.items():
        nn.ModuleList([encoder, module]).zero_grad()
        manual_seeds()
        combined, others = native(encoder, lambda rows: call(module, head.arguments, rows), poses, index)
        loss_of(combined, others).backward()
        expected = gradients_of(encoder, module)
        for mode in ACCUMULATORS_AND_PLAIN:
            with case_label(type(module).__name__, kind, mode):
                scorer = gradhooks.MultiPose(encoder, pooling, **options_of(mode))
                scorer.zero_grad()
                manual_seeds()
                prediction = scorer(poses, groups=index)
                close(prediction.combined, combined, rtol=1e-10, atol=1e-10)
                outputs = list(prediction.outputs.per_pose) if others else []
                for output, other in zip(outputs, others, strict=True):
                    close(output, other, rtol=1e-10, atol=1e-10)
                if others:
                    assert prediction.attention is outputs[0]
                loss_of(prediction.combined, outputs).backward()
                for name, gradient in gradients_of(encoder, module).items():
                    close(
                        gradient, expected[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
                    )
    ((trial,),) = [list(pooling._trials.values())]
    assert trial.together == head.together, trial.reason


def test_heads_of_torchmil(double: TensorFactory) -> None:
    for head in torchmil_heads().values():
        assert_equal_to_native(head, call_bag, double)


def test_aggregations_of_pytorch_geometric(double: TensorFactory) -> None:
    for head in aggregations().values():
        assert_equal_to_native(head, call_set, double)

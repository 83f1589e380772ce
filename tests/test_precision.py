"""Half precision: gradients do not underflow, overflows reach `.grad`, sums are float32."""

import copy

import pytest
import torch
from seeding import manual_seed
from torch import Tensor, nn

import gradhooks
from gradhooks.testing import full_graph

ACCUMULATORS = ["store", "stream", "recompute", "auto"]


class SmallGradients(nn.Module):
    """The gradients of its first layer are near the smallest numbers of float16."""

    def __init__(self, factor: float = 1e-3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        self.factor = factor

    def forward(self, pose: Tensor) -> Tensor:
        return self.last(self.first(pose) * self.factor)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_float16_gradients_do_not_underflow(accumulator: str, device: torch.device) -> None:
    manual_seed(0)
    model = SmallGradients().to(device)
    poses = [torch.randn(8, device=device) * 1e-2 for _ in range(200)]
    reference = copy.deepcopy(model)
    full_graph(reference, poses, gradhooks.combinations.Mean()).combined.sum().backward()
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with torch.autocast(device.type, torch.float16):
        combined = gradhooks.MultiPose(model, "mean", accumulator=accumulator, memory=0)(poses).combined
    scaler.scale(combined.sum()).backward()
    scaler.unscale_(optimizer)
    for leaf, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert leaf.grad is not None
        assert (leaf.grad != 0).all()
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=5e-3, atol=1e-8)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_an_overflow_reaches_grad_and_the_scaler_skips_the_step(accumulator: str) -> None:
    manual_seed(0)
    model = SmallGradients(factor=1e3)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with torch.autocast("cpu", torch.float16):
        combined = gradhooks.MultiPose(model, "mean", accumulator=accumulator, memory=0)(
            [torch.randn(8) for _ in range(5)]
        ).combined
    scaler.scale(combined.sum()).backward()
    gradients = [leaf.grad for leaf in model.parameters() if leaf.grad is not None]
    if accumulator == "recompute":  # the true coefficients exceed float16, as in the full graph
        assert any(not gradient.isfinite().all() for gradient in gradients)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() < 2.0**30
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_scale_that_overflows_is_not_used(accumulator: str) -> None:
    """The scale against underflow must not itself cause infinities where the plain backward has none."""
    manual_seed(0)
    model = SmallGradients(factor=300.0).half()
    poses = [torch.randn(8).half() for _ in range(5)]
    reference = copy.deepcopy(model).float()
    full_graph(reference, [pose.float() for pose in poses], gradhooks.combinations.Mean()).combined.sum().backward()
    gradhooks.MultiPose(model, "mean", accumulator=accumulator, memory=0)(poses).combined.sum().backward()
    for leaf, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        torch.testing.assert_close(leaf.grad.float(), expected.grad, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("accumulator", ["store", "stream", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_half_precision_gradients_are_float32(
    accumulator: str, dtype: torch.dtype, device: torch.device
) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=dtype, device=device)
    poses = [torch.full((1,), 1e-3, dtype=dtype, device=device) for _ in range(1000)]
    (1000 * gradhooks.MultiPose(model, "mean", accumulator=accumulator, memory=0)(poses).combined).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_maximum_of_large_half_precision_predictions_is_finite(dtype: torch.dtype, accumulator: str) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, -70.0)
    poses = [torch.tensor([value], dtype=dtype) for value in (1.0, 1.01, 0.99)]
    prediction = gradhooks.MultiPose(model, "max", accumulator=accumulator)(poses)
    prediction.combined.sum().backward()
    assert prediction.combined.item() == pytest.approx(prediction.per_pose.max().item(), abs=1e-2)
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(0.99, rel=1e-2)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("where", ["around the forward", "around everything", "inside the model"])
def test_bfloat16_autocast(accumulator: str, where: str) -> None:
    manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    poses = [torch.randn(8) for _ in range(6)]

    def inside(model: nn.Module, pose: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "inside the model"):
            return model(pose)

    def run(wrapped: nn.Module) -> None:
        around = torch.autocast("cpu", torch.bfloat16, enabled=where != "inside the model")
        with around:
            if isinstance(wrapped, gradhooks.MultiPose):
                combined = wrapped(poses).combined
            else:
                combined = full_graph(wrapped, poses, gradhooks.combinations.Boltzmann(), call=call).combined
            if where == "around everything":
                combined.sum().backward()
        if where != "around everything":
            combined.sum().backward()

    call = inside if where == "inside the model" else lambda model, pose: model(pose)
    reference = copy.deepcopy(model)
    run(reference)
    run(gradhooks.MultiPose(model, "boltzmann", accumulator=accumulator, call=call))
    for leaf, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=3e-2, atol=2e-2)

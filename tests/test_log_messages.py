"""Log messages let a user follow a run; they are off by default. Those of several ranks are tested with the ranks."""

from collections.abc import Iterator

import pytest
import torch
from loguru import logger
from torch import Tensor, nn

import gradhooks


@pytest.fixture
def messages() -> Iterator[list[str]]:
    collected: list[str] = []
    sink = logger.add(lambda message: collected.append(message.record["message"]), level="DEBUG")
    logger.enable("gradhooks")
    yield collected
    logger.disable("gradhooks")
    logger.remove(sink)


class Vectors(nn.Module):
    """Runs out of memory where more than two poses come at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, poses: Tensor) -> Tensor:
        if len(poses) > 2:
            raise torch.OutOfMemoryError("simulated")
        prediction: Tensor = self.linear(poses)
        return prediction


def test_nothing_is_logged_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    gradhooks.MultiPose(nn.Linear(3, 1), "min", memory=0)(torch.randn(4, 3)).combined.sum().backward()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_loading_a_plugin_is_logged_once(messages: list[str]) -> None:
    registry = gradhooks.registry.Registry("combination", "gradhooks.combinations", gradhooks.Combination)
    for _ in range(2):
        registry.create("mean")
    assert len(messages) == 1
    assert all(part in messages[0] for part in ("combination 'mean'", "gradhooks"))


def test_the_accumulator_and_a_fallback_are_logged(messages: list[str]) -> None:
    gradhooks.MultiPose(nn.Linear(3, 2), accumulator="stream")(torch.randn(4, 3))
    assert any("4 poses by recompute: 'stream' needs one number per prediction" in message for message in messages)


def test_skipping_is_logged(messages: list[str]) -> None:
    for accumulator in ("stream", "recompute"):
        messages.clear()
        model = nn.Linear(1, 1)
        nn.init.ones_(model.weight)  # the first pose has the lowest prediction
        scorer = gradhooks.MultiPose(model, gradhooks.combinations.Min(scale=1e4), accumulator=accumulator)
        scorer(torch.linspace(0, 1, 8).unsqueeze(1)).combined.sum().backward()
        assert scorer.report.skipped > 0
        assert any(f"{scorer.report.skipped} of 8 poses skipped" in message for message in messages)


def test_smaller_chunks_after_running_out_of_memory_are_logged(messages: list[str]) -> None:
    scorer = gradhooks.MultiPose(Vectors(), accumulator="recompute", audit=False)
    scorer(torch.randn(9, 3))
    halved = [message for message in messages if "out of memory" in message]
    assert "and with at most 4 poses at once" in halved[0]  # after a chunk of eight

"""An event on one rank: the others end in time with an error, or as plain PyTorch does (`rank_failures.py`)."""

import re

import pytest
import torch
from rank_events import EVENTS, TIMEOUT
from rank_events.training import FSDP2, POSE_PARALLEL
from rank_failures import AFFECTED, Outcome, broken_promises, judge

HAS_FSDP2_ON_CPU = torch.__version__ >= "2.7"
EVERY = [
    pytest.param(
        name, way, marks=pytest.mark.skipif(way == FSDP2 and not HAS_FSDP2_ON_CPU, reason="FSDP2 on a CPU: torch 2.7")
    )
    for name, event in EVENTS.items()
    for way in event.ways
]
MESSAGES = {
    ("killed in a backward", POSE_PARALLEL): "in the backward of batch 1 .*rank 1 does not answer",
    ("killed in a forward", FSDP2): "in the forward of batch 1 .*rank 1 does not answer",
    ("other memory accumulator and audit", POSE_PARALLEL): "",
    ("other dtype", FSDP2): r"parameter 'first.weight'\. rank 0: .*float64.*rank 1: .*float32",
    ("a frozen parameter", FSDP2): r"parameter 'first.bias'\. rank 0: .*trainable; rank 1: .*frozen",
    ("no grad", FSDP2): r"differ in grad mode\. rank 0: on; rank 1: off",
    ("a parameter is unused", FSDP2): "the poses of rank 0 use parameter 'second.weight'",
    ("the first pose raises", FSDP2): "failed in the forward.*rank 1 of 2: LocalError",
    ("reading poses raises", FSDP2): "failed in the reading of the poses.*rank 1 of 2: LocalError",
    ("weights change before the backward", POSE_PARALLEL): "failed in the backward.*rank 1 of 2: RuntimeError",
}
"""A selection, with what the errors say; an empty string where none is raised."""


@pytest.mark.skipif(not HAS_FSDP2_ON_CPU, reason="FSDP2 runs on a CPU from torch 2.7 on")
def test_events_on_one_rank() -> None:
    for (name, way), message in MESSAGES.items():
        seen, broken = judge(name, way)
        assert (name, way, broken) == (name, way, [])
        for rank, each in enumerate(seen):
            if rank != AFFECTED:
                assert re.search(message, each.message), (name, way, each)
                assert bool(each.kind) == bool(message)


@pytest.mark.long
@pytest.mark.parametrize(("name", "way"), EVERY)
def test_every_event(name: str, way: str) -> None:
    assert judge(name, way)[1] == []


def test_promises_can_be_broken() -> None:
    event = EVENTS["killed in a backward"]
    good = Outcome(1.0, "DistributedError", "rank 1 does not answer", goes_on=True)
    expected = {
        "aborted or hangs": good._replace(kind="ProcessDied"),
        "late": good._replace(seconds=TIMEOUT + 3),
        "no rank is named": good._replace(message="Connection closed"),
        "state changed": good._replace(unchanged=False),
        "does not go on in a new group": good._replace(goes_on=False),
    }
    assert broken_promises(event, POSE_PARALLEL, [good, good, good], None) == []
    for broken, outcome in expected.items():
        assert broken_promises(event, POSE_PARALLEL, [good, good, outcome], None) == [broken]
    silent = Outcome(1.0, parameters=[torch.ones(2)])
    assert "some ranks do not raise" in broken_promises(event, POSE_PARALLEL, [silent, good, good], None)
    other = silent._replace(parameters=[torch.zeros(2)])
    allowed = EVENTS["other buffers"]
    assert broken_promises(allowed, POSE_PARALLEL, [silent, silent], [silent, silent]) == []
    assert broken_promises(allowed, POSE_PARALLEL, [silent, other], [silent, silent]) == [
        "differs silently from plain PyTorch"
    ]

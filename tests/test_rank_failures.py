"""A rank that is killed, ends or does not come: the others raise in time, name it, are unchanged and can go on."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from rank_failures import ENDS, MOMENTS, TIMEOUT, WAYS, Seen, survivors


def check(seen: Seen, way: str, moment: str, how: str) -> None:
    waited = TIMEOUT if how == "sleep" else 0.0
    assert seen.kind, "no error"
    assert not math.isnan(seen.seconds)
    assert seen.seconds < waited + 2.5, seen
    if way == "pose parallel":
        step = {"before": "reading of the poses", "forward": "forward"}.get(moment, "backward")
        assert seen.kind == "DistributedError"
        assert re.search(rf"waited for the other ranks in the {step} of batch 1.*rank 1 does not answer", seen.message)
        assert seen.unchanged
        assert seen.goes_on
        assert re.search("^PosesError: .*got one int.* Besides, rank . waited for", seen.own_error)


@pytest.mark.parametrize(("moment", "how"), [("backward", "SIGKILL")])
def test_a_lost_rank_is_named(moment: str, how: str, tmp_path: Path) -> None:
    for seen in survivors("pose parallel", moment, how, str(tmp_path)):
        check(seen, "pose parallel", moment, how)


@pytest.mark.long
@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 runs on a CPU from torch 2.7 on")
@pytest.mark.parametrize(("way", "moment", "how"), list(itertools.product(WAYS, MOMENTS, ENDS)))
def test_every_event(way: str, moment: str, how: str, tmp_path: Path) -> None:
    for seen in survivors(way, moment, how, str(tmp_path)):
        check(seen, way, moment, how)

"""One rank is killed, ends, or is busy with something else for longer than the timeout of collectives."""

import itertools
import os
import signal
import time
from collections.abc import Callable

from rank_events.errors import disturb, fail_in_backward, good_step
from rank_events.event import event
from rank_events.training import WAYS, Run

TIMEOUT = 4.0
"""Seconds, of collectives: what a user sets."""


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended() -> None:
    os._exit(3)


def busy() -> None:
    time.sleep(TIMEOUT + 4)


def before_a_batch(run: Run, end: Callable[[], None]) -> None:
    good_step(run)
    if run.affected:
        end()
    run.train()


def in_a_forward(run: Run, end: Callable[[], None]) -> None:
    good_step(run)
    disturb(run, 2, "forward", end)
    run.train()


def between_forward_and_backward(run: Run, end: Callable[[], None]) -> None:
    good_step(run)
    loss = run.forward()
    if run.affected:
        end()
    run.backward(loss)


def in_a_backward(run: Run, end: Callable[[], None]) -> None:
    good_step(run)
    fail_in_backward(run, end)
    run.train()


def _register(moment: Callable[..., None], end: Callable[[], None]) -> None:
    def happens(run: Run) -> None:
        moment(run, end)

    happens.__name__ = f"{end.__name__}_{moment.__name__}"
    event("lost", refused=WAYS, ranks=3)(happens)


MOMENTS = (before_a_batch, in_a_forward, between_forward_and_backward, in_a_backward)
for _moment, _end in itertools.product(MOMENTS, (killed, ended, busy)):
    _register(_moment, _end)

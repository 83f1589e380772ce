"""Findings: what the audit found out about a model in one mode."""

from typing import NamedTuple


class Findings(NamedTuple):
    """What holds for the poses of a model.

    Attributes:
        repeatable: Whether a second run gives the prediction and the gradient of the first.
        linear: Whether the backward is linear in its cotangent. If not, neither a pose may be skipped nor a backward
            run before its coefficient is known.
    """

    repeatable: bool = True
    linear: bool = True


TRUSTED = Findings()
"""What is assumed of a model without an audit."""

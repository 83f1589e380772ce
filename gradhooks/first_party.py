"""The names that this project provides: the built-in ones, and those of its plugin distributions."""

import re
from collections.abc import Mapping
from importlib.metadata import distributions
from types import MappingProxyType

GRADHOOKS = "gradhooks"
"""The distribution whose names take precedence."""

BUILT_IN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gradhooks.combinations": {
            "mean": "gradhooks.combinations:Mean",
            "max": "gradhooks.combinations:Max",
            "min": "gradhooks.combinations:Min",
            "boltzmann": "gradhooks.combinations:Boltzmann",
        },
        "gradhooks.accumulators": {
            "auto": "gradhooks.accumulators:Auto",
            "store": "gradhooks.accumulators:Store",
            "stream": "gradhooks.accumulators:Stream",
            "recompute": "gradhooks.accumulators:Recompute",
        },
    }
)
"""The entry points of gradhooks itself, as in pyproject.toml, by group and name."""

FIRST_PARTY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gradhooks-mil": (
            "attention",
            "gated_attention",
            "generalized_mean",
            "linear_softmax",
            "log_mean_exp",
            "noisy_or",
            "power_pooling",
            "top_k_mean",
        ),
        "gradhooks-robust": ("clipped_gradients", "conflict_free_gradient", "median_gradient"),
    }
)
"""The combinations that each distribution provides."""


def normalize(distribution: str) -> str:
    """Return the spelling of a distribution's name under which two spellings compare equal."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def first_party_provider(name: str) -> str:
    """Return the first-party distribution that has a name, and how to get it; empty if there is none."""
    given, _, short = name.rpartition(":")
    for distribution, names in FIRST_PARTY.items():
        if short in names and normalize(given) in ("", distribution):
            installed = next(iter(distributions(name=distribution)), None)
            if installed is None:
                return f"{distribution}, which is not installed: pip install {distribution}"
            return f"newer versions of {distribution} than {installed.version}: pip install --upgrade {distribution}"
    return ""

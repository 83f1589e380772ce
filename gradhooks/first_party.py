"""The plugin distributions of this project, so that an error can say which one to install."""

from collections.abc import Mapping
from importlib.metadata import distributions
from types import MappingProxyType

from gradhooks.entry_points import normalize

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

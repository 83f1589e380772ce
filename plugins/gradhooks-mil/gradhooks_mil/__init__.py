"""Combinations for multiple-instance learning with gradhooks."""

from gradhooks_mil.attention import Attention, GatedAttention
from gradhooks_mil.generalized_mean import GeneralizedMean
from gradhooks_mil.log_mean_exp import LogMeanExp
from gradhooks_mil.noisy_or import NoisyOr
from gradhooks_mil.power_pooling import LinearSoftmax, PowerPooling
from gradhooks_mil.top_k_mean import TopKMean

__all__ = [
    "Attention",
    "GatedAttention",
    "GeneralizedMean",
    "LinearSoftmax",
    "LogMeanExp",
    "NoisyOr",
    "PowerPooling",
    "TopKMean",
]

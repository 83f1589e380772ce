"""Weights that are computed from parameters."""

import warnings
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, model_case, rows_of


def _net(factory: TensorFactory, parametrize: Callable[[nn.Linear], nn.Module]) -> ModelCase:
    model = nn.Sequential(parametrize(nn.Linear(4, 6)), nn.Tanh(), parametrize(nn.Linear(6, 6)), nn.Linear(6, 1))
    return ModelCase(model, rows_of(factory.randn(MOST_POSES, 4)))


@model_case()
def weight_norm_by_parametrization(factory: TensorFactory) -> ModelCase:
    return _net(factory, parametrizations.weight_norm)


@model_case()
def weight_norm_by_hooks(factory: TensorFactory) -> ModelCase:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but widely used
        return _net(factory, weight_norm)


@model_case(bit_for_bit=False)
def spectral_norm_by_parametrization(factory: TensorFactory) -> ModelCase:
    return _net(factory, parametrizations.spectral_norm)


@model_case(bit_for_bit=False)
def spectral_norm_by_hooks(factory: TensorFactory) -> ModelCase:
    return _net(factory, spectral_norm)


@model_case(bit_for_bit=False)
def orthogonal_weight(factory: TensorFactory) -> ModelCase:
    return _net(factory, parametrizations.orthogonal)

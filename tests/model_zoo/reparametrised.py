"""Weights that are computed from parameters."""

import warnings
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from model_zoo.specimen import MOST_POSES, Place, Specimen, some_of, species


def _net(place: Place, reparametrise: Callable[[nn.Linear], nn.Module]) -> Specimen:
    model = nn.Sequential(reparametrise(nn.Linear(4, 6)), nn.Tanh(), reparametrise(nn.Linear(6, 6)), nn.Linear(6, 1))
    return Specimen(model, some_of(place.randn(MOST_POSES, 4)))


@species()
def weight_norm_by_parametrization(place: Place) -> Specimen:
    return _net(place, parametrizations.weight_norm)


@species()
def weight_norm_by_hooks(place: Place) -> Specimen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and everywhere
        return _net(place, weight_norm)


@species(bit_for_bit=False)
def spectral_norm_by_parametrization(place: Place) -> Specimen:
    return _net(place, parametrizations.spectral_norm)


@species(bit_for_bit=False)
def spectral_norm_by_hooks(place: Place) -> Specimen:
    return _net(place, spectral_norm)


@species(bit_for_bit=False)
def orthogonal_weight(place: Place) -> Specimen:
    return _net(place, parametrizations.orthogonal)

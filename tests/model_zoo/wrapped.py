"""Models inside something else."""

import warnings

import torch
from torch import Tensor, nn

import gradhooks
from model_zoo.specimen import MOST_POSES, Place, Specimen, mlp, some_of, species


@species()
def torch_script(place: Place) -> Specimen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        model = torch.jit.script(mlp(4, 6, 1))
    return Specimen(model, some_of(place.randn(MOST_POSES, 4)))


class Ensemble(nn.Module):
    """Itself scores a group for each pose."""

    def __init__(self, accumulator: str) -> None:
        super().__init__()
        self.group = gradhooks.MultiPose(mlp(4, 6, 1), gradhooks.combinations.Boltzmann(), accumulator=accumulator)
        self.head = nn.Linear(1, 1)

    def forward(self, poses: Tensor) -> Tensor:
        return self.head(self.group(poses.unbind()).combined)


def _in_one_graph(model: nn.Module, poses: Tensor) -> Tensor:
    assert isinstance(model, Ensemble)
    predictions = torch.stack([model.group.model(pose) for pose in poses.unbind()])
    return model.head(gradhooks.combinations.Boltzmann()(predictions))


@species(bit_for_bit=False)
def multi_pose_inside_by_stream(place: Place) -> Specimen:
    return Specimen(Ensemble("stream"), some_of(place.randn(MOST_POSES, 3, 4)), plain_call=_in_one_graph)


@species(bit_for_bit=False)
def multi_pose_inside_by_recompute(place: Place) -> Specimen:
    return Specimen(Ensemble("recompute"), some_of(place.randn(MOST_POSES, 3, 4)), plain_call=_in_one_graph)

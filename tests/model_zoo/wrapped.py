"""TorchScript, and a MultiPose inside the model."""

import warnings

import torch
from torch import Tensor, nn

import gradhooks
from model_zoo.model_case import MOST_POSES, ModelCase, TensorFactory, mlp, model_case, rows_of


@model_case()
def torch_script(factory: TensorFactory) -> ModelCase:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still used
        model = torch.jit.script(mlp(4, 6, 1))
    return ModelCase(model, rows_of(factory.randn(MOST_POSES, 4)))


class Ensemble(nn.Module):
    """Scores a group for each pose, with a MultiPose of its own."""

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


@model_case(bit_for_bit=False)
def multi_pose_inside_by_stream(factory: TensorFactory) -> ModelCase:
    return ModelCase(Ensemble("stream"), rows_of(factory.randn(MOST_POSES, 3, 4)), plain_call=_in_one_graph)


@model_case(bit_for_bit=False)
def multi_pose_inside_by_recompute(factory: TensorFactory) -> ModelCase:
    return ModelCase(Ensemble("recompute"), rows_of(factory.randn(MOST_POSES, 3, 4)), plain_call=_in_one_graph)

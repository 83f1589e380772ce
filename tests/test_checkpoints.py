"""Checkpoints have the keys of the bare model, and are exchanged with it in both directions."""

import pytest
import torch
from checkpoint_helpers import assert_same_state, learnable_boltzmann, save_and_load
from model_zoo import TensorFactory, build, mlp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from gradhooks import MultiPose

STATEFUL = ["plain_mlp", "batch_norm_in_training", "tied_weights", "spectral_norm_by_parametrization", "lstm"]


@pytest.mark.parametrize("name", STATEFUL)
def test_the_keys_are_those_of_the_bare_model(name: str, double: TensorFactory) -> None:
    model = build(name, double).model
    bare = model.state_dict()
    scorer = MultiPose(model, "min")
    state = scorer.state_dict()
    assert list(state) == list(bare)
    assert_same_state(state, bare)
    assert list(model.state_dict()) == list(bare)
    learnable = MultiPose(model, learnable_boltzmann(0.5)).state_dict()
    assert list(learnable) == [*bare, "combination.log_temperature"]


def test_the_metadata_are_those_of_the_bare_model(double: TensorFactory) -> None:
    # They contain the versions of the layers, by which PyTorch converts old checkpoints.
    model = build("batch_norm_in_training", double).model
    bare, wrapped = (module.state_dict()._metadata for module in (model, MultiPose(model, "min")))
    assert bare.items() <= wrapped.items()


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("combination", ["min", "learnable"])
def test_checkpoints_are_exchanged_with_the_bare_model(name: str, combination: str, double: TensorFactory) -> None:
    def fresh() -> MultiPose:
        chosen = learnable_boltzmann(0.5) if combination == "learnable" else "min"
        return MultiPose(_add_one(build(name, double).model), chosen)

    trained = MultiPose(build(name, double).model, learnable_boltzmann(0.7) if combination == "learnable" else "min")
    state = save_and_load(trained.state_dict(), weights_only=True)
    keys = list(state)

    bare = _add_one(build(name, double).model)
    bare.load_state_dict(state, strict=combination != "learnable")
    assert_same_state(bare.state_dict(), trained.model.state_dict())

    wrapped = fresh()
    wrapped.load_state_dict(state)
    assert_same_state(wrapped.state_dict(), state)

    from_bare = fresh()
    mismatch = from_bare.load_state_dict(trained.model.state_dict(), strict=combination != "learnable")
    assert_same_state(from_bare.model.state_dict(), trained.model.state_dict())
    assert mismatch.missing_keys == (["combination.log_temperature"] if combination == "learnable" else [])
    assert mismatch.unexpected_keys == []

    assigned = fresh()
    assigned.load_state_dict(state, assign=True)
    assert_same_state(assigned.state_dict(), state)
    assert list(state) == keys


def _add_one(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


class Pipeline(nn.Module):
    """A larger model that contains a scorer, or a bare model."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.scorer = scorer
        self.readout = nn.Linear(1, 1)


@pytest.mark.parametrize("combination", ["min", "learnable"])
def test_a_checkpoint_of_a_larger_model(combination: str) -> None:
    def wrapped() -> Pipeline:
        return Pipeline(MultiPose(mlp(4, 6, 1), learnable_boltzmann(0.5) if combination == "learnable" else "min"))

    one, other, bare = wrapped(), wrapped(), Pipeline(mlp(4, 6, 1))
    state = one.state_dict()
    extra = {"scorer.combination.log_temperature"} if combination == "learnable" else set()
    assert set(state) == {*bare.state_dict(), *extra}
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), state)
    bare.load_state_dict(state, strict=not extra)
    assert_same_state(bare.state_dict(), {name: value for name, value in state.items() if name not in extra})
    third = wrapped()
    third.load_state_dict(bare.state_dict(), strict=not extra)
    assert_same_state(third.encoder.state_dict(), bare.encoder.state_dict())
    assert isinstance(third.scorer, MultiPose)
    assert_same_state(third.scorer.model.state_dict(), bare.scorer.state_dict())
    assert_same_state(one.state_dict(prefix="all."), {f"all.{name}": value for name, value in state.items()})


class SameChildNames(nn.Module):
    """Has children with the names of attributes of `MultiPose`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)
        self.combination = nn.Linear(4, 1)
        self.accumulator = nn.Linear(4, 1)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.model(pose).tanh()
        return self.combination(hidden) + self.accumulator(hidden)


def test_a_model_with_children_named_as_those_of_multi_pose() -> None:
    scorer, other, bare = MultiPose(SameChildNames(), "min"), MultiPose(SameChildNames(), "min"), SameChildNames()
    state = scorer.state_dict()
    assert list(state) == list(bare.state_dict())
    other.load_state_dict(state)
    bare.load_state_dict(state)
    for loaded in (other, bare):
        assert_same_state(loaded.state_dict(), state)


def test_missing_and_unexpected_keys_are_an_error() -> None:
    scorer = MultiPose(mlp(4, 6, 1), "min")
    state = scorer.state_dict()
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0\.bias"):
        scorer.load_state_dict({name: value for name, value in state.items() if name != "0.bias"})
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*another"):
        scorer.load_state_dict({**state, "another": torch.ones(1)})


@pytest.mark.parametrize("prefix", ["", "scorer."])
def test_missing_and_unexpected_keys_are_those_of_the_checkpoint(prefix: str) -> None:
    module: nn.Module = MultiPose(mlp(4, 6, 1), learnable_boltzmann(0.5))
    state = module.state_dict()
    if prefix:
        module = Pipeline(module)
        state = module.state_dict()
    del state[f"{prefix}0.bias"], state[f"{prefix}combination.log_temperature"]
    mismatch = module.load_state_dict({**state, f"{prefix}another": torch.ones(1)}, strict=False)
    assert mismatch.missing_keys == [f"{prefix}0.bias", f"{prefix}combination.log_temperature"]
    assert mismatch.unexpected_keys == [f"{prefix}another"]


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("prefix", ["", "scorer."])
@pytest.mark.parametrize("full", [True, False])
def test_distributed_checkpoints_find_the_keys(name: str, prefix: str, full: bool, double: TensorFactory) -> None:
    def module(model: nn.Module) -> nn.Module:
        scorer = MultiPose(model, learnable_boltzmann(0.5))
        return Pipeline(scorer) if prefix else scorer

    trained, other = module(build(name, double).model), module(_add_one(build(name, double).model))
    state = get_model_state_dict(trained)
    assert list(state) == list(trained.state_dict())
    set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=full))
    assert_same_state(other.state_dict(), trained.state_dict())


def test_a_multi_pose_inside_of_a_multi_pose() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.group = MultiPose(mlp(4, 6, 1), learnable_boltzmann(0.5))

        def forward(self, poses: Tensor) -> Tensor:
            return self.group(poses).combined

    scorer, other = (MultiPose(Ensemble(), learnable_boltzmann(0.7)) for _ in range(2))
    state = scorer.state_dict()
    assert set(state) == {
        *(f"group.{name}" for name in mlp(4, 6, 1).state_dict()),
        "group.combination.log_temperature",
        "combination.log_temperature",
    }
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), state)

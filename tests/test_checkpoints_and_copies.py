"""Checkpoints are the bare model's, models change between groups, and a decorated class stays a class."""

import abc
import copy
import inspect
import io
import pickle
import pydoc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_state import requires_fqn_modifiers
from model_zoo import TensorFactory, build, mlp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from training_reference import ACCUMULATORS, COMBINATIONS, assert_same_gradients, gradients_of, loss_on_both

import gradhooks
from gradhooks import MultiPose
from gradhooks.testing import full_graph

STATEFUL = ["plain_mlp", "batch_norm_in_training", "tied_weights", "spectral_norm_by_parametrization", "lstm"]


def of_temperature(value: float) -> gradhooks.combinations.Boltzmann:
    return gradhooks.combinations.Boltzmann(value, learnable=True)


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def through_a_file(thing: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),  # noqa: S301  # our own
    "torch.save": lambda thing: through_a_file(thing, weights_only=False),
}


# -- state_dict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATEFUL)
def test_the_keys_are_those_of_the_bare_model(name: str, double: TensorFactory) -> None:
    model = build(name, double).model
    bare = model.state_dict()
    scorer = MultiPose(model, "min")
    state = scorer.state_dict()
    assert list(state) == list(bare)
    assert_same_state(state, bare)
    assert list(model.state_dict()) == list(bare)
    learnable = MultiPose(model, of_temperature(0.5)).state_dict()
    assert list(learnable) == [*bare, "combination.log_temperature"]


def test_the_metadata_are_those_of_the_bare_model(double: TensorFactory) -> None:
    # Versions of the layers, by which old checkpoints are converted.
    model = build("batch_norm_in_training", double).model
    bare, wrapped = (module.state_dict()._metadata for module in (model, MultiPose(model, "min")))
    assert bare.items() <= wrapped.items()


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("combination", ["min", "learnable"])
def test_a_checkpoint_goes_both_ways(name: str, combination: str, double: TensorFactory) -> None:
    def fresh() -> MultiPose:
        made = of_temperature(0.5) if combination == "learnable" else "min"
        return MultiPose(_scrambled(build(name, double).model), made)

    trained = MultiPose(build(name, double).model, of_temperature(0.7) if combination == "learnable" else "min")
    state = through_a_file(trained.state_dict(), weights_only=True)
    keys = list(state)

    bare = _scrambled(build(name, double).model)
    bare.load_state_dict(state, strict=combination != "learnable")
    assert_same_state(bare.state_dict(), trained.model.state_dict())

    wrapped = fresh()
    wrapped.load_state_dict(state)
    assert_same_state(wrapped.state_dict(), state)

    of_bare = fresh()
    left_out = of_bare.load_state_dict(trained.model.state_dict(), strict=combination != "learnable")
    assert_same_state(of_bare.model.state_dict(), trained.model.state_dict())
    assert left_out.missing_keys == (["combination.log_temperature"] if combination == "learnable" else [])
    assert left_out.unexpected_keys == []

    assigned = fresh()
    assigned.load_state_dict(state, assign=True)
    assert_same_state(assigned.state_dict(), state)
    assert list(state) == keys


def _scrambled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


class Pipeline(nn.Module):
    """Something larger that has a scorer, or a bare model, in the middle."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.scorer = scorer
        self.readout = nn.Linear(1, 1)


@pytest.mark.parametrize("combination", ["min", "learnable"])
def test_a_checkpoint_of_something_larger(combination: str) -> None:
    def wrapped() -> Pipeline:
        return Pipeline(MultiPose(mlp(4, 6, 1), of_temperature(0.5) if combination == "learnable" else "min"))

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


class Awkward(nn.Module):
    """Names its children as `MultiPose` names its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)
        self.combination = nn.Linear(4, 1)
        self.accumulator = nn.Linear(4, 1)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.model(pose).tanh()
        return self.combination(hidden) + self.accumulator(hidden)


def test_children_with_the_names_of_ours() -> None:
    scorer, other, bare = MultiPose(Awkward(), "min"), MultiPose(Awkward(), "min"), Awkward()
    state = scorer.state_dict()
    assert list(state) == list(bare.state_dict())
    other.load_state_dict(state)
    bare.load_state_dict(state)
    for same in (other, bare):
        assert_same_state(same.state_dict(), state)


def test_missing_and_unexpected_keys_are_an_error() -> None:
    scorer = MultiPose(mlp(4, 6, 1), "min")
    state = scorer.state_dict()
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0\.bias"):
        scorer.load_state_dict({name: value for name, value in state.items() if name != "0.bias"})
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*another"):
        scorer.load_state_dict({**state, "another": torch.ones(1)})


@pytest.mark.parametrize("prefix", ["", "scorer."])
def test_what_does_not_fit_is_reported_by_the_keys_of_the_checkpoint(prefix: str) -> None:
    module: nn.Module = MultiPose(mlp(4, 6, 1), of_temperature(0.5))
    state = module.state_dict()
    if prefix:
        module = Pipeline(module)
        state = module.state_dict()
    del state[f"{prefix}0.bias"], state[f"{prefix}combination.log_temperature"]
    left_out = module.load_state_dict({**state, f"{prefix}another": torch.ones(1)}, strict=False)
    assert left_out.missing_keys == [f"{prefix}0.bias", f"{prefix}combination.log_temperature"]
    assert left_out.unexpected_keys == [f"{prefix}another"]


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("prefix", ["", "scorer."])
@pytest.mark.parametrize("full", [pytest.param(True, marks=requires_fqn_modifiers), False])
def test_distributed_checkpoints_find_the_keys(name: str, prefix: str, full: bool, double: TensorFactory) -> None:
    def module(model: nn.Module) -> nn.Module:
        scorer = MultiPose(model, of_temperature(0.5))
        return Pipeline(scorer) if prefix else scorer

    trained, other = module(build(name, double).model), module(_scrambled(build(name, double).model))
    state = get_model_state_dict(trained)
    assert list(state) == list(trained.state_dict())
    set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=full))
    assert_same_state(other.state_dict(), trained.state_dict())


def test_a_group_inside_of_a_group() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.group = MultiPose(mlp(4, 6, 1), of_temperature(0.5))

        def forward(self, poses: Tensor) -> Tensor:
            return self.group(poses).combined

    scorer, other = (MultiPose(Ensemble(), of_temperature(0.7)) for _ in range(2))
    state = scorer.state_dict()
    assert set(state) == {
        *(f"group.{name}" for name in mlp(4, 6, 1).state_dict()),
        "group.combination.log_temperature",
        "combination.log_temperature",
    }
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), state)


# -- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("name", ["plain_mlp", "batch_norm_in_training", "tied_weights", "lstm"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_scorer_train_alike(how: str, name: str, accumulator: str, double: TensorFactory) -> None:
    case = build(name, double)
    scorer = MultiPose(case.model, of_temperature(0.7), accumulator=accumulator)
    loss_on_both(scorer(case.make_poses(4))).backward()
    twin = COPIES[how](scorer)
    assert twin.model is not scorer.model
    assert_same_state(twin.state_dict(), scorer.state_dict())
    for module in (scorer, twin):
        module.zero_grad()
        loss_on_both(module(case.make_poses(5))).backward()
    assert_same_gradients(
        gradients_of(dict(twin.named_parameters())), gradients_of(dict(scorer.named_parameters())), tolerance=0.0
    )


def test_a_copied_prediction_has_lost_its_graph_and_not_its_numbers(double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    with torch.no_grad():
        prediction = MultiPose(case.model, "min")(case.make_poses(3))
    twin = gradhooks.MultiPosePrediction(*pickle.loads(pickle.dumps(tuple(prediction))))  # noqa: S301  # our own
    assert torch.equal(twin.combined, prediction.combined)
    assert torch.equal(twin.per_pose, prediction.per_pose)


# -- a model that changes between groups ----------------------------------------------------------------------------


class LowRank(nn.Module):
    """An adapter beside a frozen layer, as LoRA adds it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.ones(2, layer.in_features).to(layer.weight) / 3)
        self.up = nn.Parameter(torch.ones(layer.out_features, 2).to(layer.weight) / 5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) + self.up @ (self.down @ hidden)


def _adapt(model: nn.Sequential) -> None:
    model.requires_grad_(False)
    model[0] = LowRank(model[0])


def _replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def _load(model: nn.Sequential) -> None:
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})


def _load_by_assignment(model: nn.Sequential) -> None:
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()}, assign=True)


def _set_data(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def _drop_bias(model: nn.Sequential) -> None:
    model[0].bias = None


CHANGES: dict[str, Callable[[Any], object]] = {
    "narrower": lambda model: model.to(torch.float32),
    "there and back": lambda model: model.float().double(),
    "a checkpoint": _load,
    "a checkpoint, assigned": _load_by_assignment,
    "data": _set_data,
    "an adapter": _adapt,
    "another parameter": _replace_parameter,
    "another layer": lambda model: model.__setitem__(2, nn.Linear(8, 1).to(model[0].weight)),
    "one layer more": lambda model: model.append(nn.Linear(1, 1).to(model[0].weight)),
    "no bias": _drop_bias,
    "tied": lambda model: setattr(model[0], "bias", model[0].bias),
    "frozen": lambda model: model[0].requires_grad_(False),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    "evaluation": lambda model: model.eval(),
}


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_groups(change: str, accumulator: str, double: TensorFactory) -> None:
    gradients = []
    for of_group in (True, False):
        torch.manual_seed(3)
        case = build("plain_mlp", double)
        model, combination = case.model, COMBINATIONS["boltzmann"]()
        scorer = MultiPose(model, combination, accumulator=accumulator)
        poses = case.make_poses(5)
        for changed in (False, True):
            if changed:
                CHANGES[change](model)
                poses = [pose.to(next(model.parameters()).dtype) for pose in poses]
            prediction = scorer(poses) if of_group else full_graph(model, poses, combination)
            loss_on_both(prediction).backward()
        gradients.append(gradients_of(dict(model.named_parameters())))
    assert_same_gradients(*gradients, tolerance=1e-5 if change == "narrower" else 1e-12)


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_a_parameter_that_is_thawed_and_frozen(accumulator: str, double: TensorFactory) -> None:
    case = build("plain_mlp", double)
    scorer = MultiPose(case.model, "boltzmann", accumulator=accumulator)
    first = case.model.get_parameter("0.weight")
    for trained in (False, True, False):
        first.requires_grad_(trained)
        scorer.zero_grad()
        loss_on_both(scorer(case.make_poses(3))).backward()
        assert (first.grad is not None) == trained


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_the_scorer_moves_as_one(accumulator: str) -> None:
    scorer = MultiPose(mlp(4, 6, 1), of_temperature(0.7), accumulator=accumulator).to(torch.float64)
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.float64}
    assert scorer.eval().model.training is False
    assert scorer.train().model.training is True
    loss_on_both(scorer(torch.randn(3, 4, dtype=torch.float64).unbind())).backward()
    assert all(parameter.grad is not None for parameter in scorer.requires_grad_().parameters())


# -- decorated classes ----------------------------------------------------------------------------------------------


@gradhooks.multipose("boltzmann", accumulator="recompute")
class Scorer(nn.Module):
    """Scores a pose."""

    def __init__(self, width: int, *, depth: int = 1) -> None:
        super().__init__()
        self.net = mlp(4, *[width] * depth, 1)
        self.cutoff = 5.0

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose)

    def doubled(self) -> float:
        return 2 * self.cutoff

    @property
    def width(self) -> int:
        layer = self.net[0]
        assert isinstance(layer, nn.Linear)
        return layer.out_features

    @classmethod
    def small(cls) -> Any:
        return cls(2)

    @staticmethod
    def unit() -> str:
        return "kcal/mol"


class Shifted(Scorer):
    """Scores a pose, and adds what it has learned."""

    def __init__(self, width: int) -> None:
        super().__init__(width, depth=2)
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, pose: Tensor) -> Tensor:
        return super().forward(pose) + self.shift


class Scaled(Shifted):
    def forward(self, pose: Tensor) -> Tensor:
        return 2 * super().forward(pose)


@gradhooks.multipose("min")
class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, pose: Tensor) -> Tensor: ...


class Concrete(Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.net(pose)


@gradhooks.multipose("mean")
class Named(nn.Module):
    """Calls `super` by its own name."""

    def __init__(self) -> None:
        super(Named, self).__init__()  # noqa: UP008  # as in old code


def test_an_instance_of_a_decorated_class() -> None:
    scorer = Scorer(6, depth=2)
    assert isinstance(scorer, MultiPose)
    assert isinstance(scorer, Scorer)
    assert isinstance(scorer, nn.Module)
    assert isinstance(scorer.model, Scorer)
    assert not isinstance(scorer.model, MultiPose)
    assert not isinstance(MultiPose(nn.Linear(4, 1)), Scorer)
    assert not isinstance(nn.Linear(4, 1), Scorer)
    assert scorer.accumulator.name == "recompute"
    assert isinstance(scorer.combination, gradhooks.combinations.Boltzmann)


def test_a_decorated_class_stays_a_class() -> None:
    assert inspect.isclass(Scorer)
    assert issubclass(Scorer, nn.Module)
    assert not issubclass(Scorer, MultiPose)
    assert issubclass(Shifted, Scorer)
    assert (Scorer.__name__, Scorer.__qualname__, Scorer.__module__) == ("Scorer", "Scorer", __name__)
    assert Scorer.__doc__ == "Scores a pose."
    assert Scorer.unit() == "kcal/mol"
    assert isinstance(Scorer.small(), MultiPose)


def test_help_and_signature() -> None:
    assert list(inspect.signature(Scorer).parameters) == ["width", "depth"]
    assert str(inspect.signature(Scorer)).startswith("(width: int, *, depth: int = 1)")
    assert list(inspect.signature(Shifted).parameters) == ["width"]
    text = pydoc.plain(pydoc.render_doc(Scorer))
    assert "Scores a pose." in text
    assert "width: int, *, depth: int = 1" in text
    assert "def doubled" in inspect.getsource(Scorer) or "doubled" in text


def test_wrong_arguments_get_the_usual_error() -> None:
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'width'"):
        Scorer()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'breadth'"):
        Scorer(4, breadth=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("make", [lambda: Scorer(6), lambda: Shifted(6), lambda: Scaled(6), Concrete])
def test_training(make: Callable[[], Any]) -> None:
    gradients = []
    for of_group in (True, False):
        torch.manual_seed(3)
        scorer = make().double()
        poses = list(torch.randn(5, 4, dtype=torch.float64))
        loss_on_both(scorer(poses) if of_group else full_graph(scorer.model, poses, scorer.combination)).backward()
        gradients.append(gradients_of(dict(scorer.named_parameters())))
    assert_same_gradients(*gradients)


def test_subclasses_define_the_forward_of_one_pose() -> None:
    scaled, shifted = Scaled(6), Shifted(6)
    assert isinstance(scaled, Shifted)
    assert isinstance(scaled, MultiPose)
    assert type(scaled.model) is Scaled
    shifted.load_state_dict(scaled.state_dict())
    pose = torch.randn(4)
    torch.testing.assert_close(scaled.model(pose), 2 * shifted.model(pose))
    assert list(scaled.state_dict())[:1] == ["shift"]


def test_abstract_classes() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Abstract()  # type: ignore[abstract]
    assert isinstance(Concrete(), Abstract)
    assert isinstance(Concrete(), MultiPose)
    assert issubclass(Concrete, Abstract)
    assert inspect.isabstract(Abstract)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [lambda: Scorer(6), lambda: Scaled(6), Concrete])
def test_instances_are_copied_and_pickled_by_reference(make: Callable[[], Any], how: str) -> None:
    scorer = make()
    for thing in (scorer, scorer.model):
        twin = COPIES[how](thing)
        assert type(twin) is type(thing)
        assert_same_state(twin.state_dict(), thing.state_dict())
    assert type(COPIES[how](scorer).model) is type(scorer.model)
    assert pickle.loads(pickle.dumps(type(scorer.model))) is type(scorer.model)  # noqa: S301  # our own


def test_attributes_of_the_bare_model_are_reachable() -> None:
    scorer = Scorer(6)
    assert scorer.cutoff == 5.0
    assert scorer.doubled() == 10.0
    assert scorer.width == 6
    assert scorer.net is scorer.model.net
    scorer.model.cutoff = 6.0
    assert scorer.doubled() == 12.0
    with pytest.raises(AttributeError, match="neither MultiPose nor its model, a Scorer, has an attribute 'missing'"):
        _ = scorer.missing
    wrapped = MultiPose(nn.Linear(4, 1))
    assert wrapped.in_features == 4
    assert wrapped.weight is wrapped.model.weight
    with pytest.raises(AttributeError, match="its model, a Linear, has an attribute 'missing'"):
        _ = wrapped.missing


def test_super_by_name_is_explained() -> None:
    with pytest.raises(TypeError, match=r"Named.__init__ calls itself without end: .* write super\(\)"):
        Named()


def test_an_instance_is_wrapped() -> None:
    model = mlp(4, 6, 1)
    scorer = gradhooks.multipose("min", accumulator="stream", chunk_size=2)(model)
    assert isinstance(scorer, MultiPose)
    assert scorer.model is model
    assert (scorer.accumulator.name, scorer.chunk_size) == ("stream", 2)
    assert isinstance(scorer.combination, gradhooks.combinations.Min)


def test_each_instance_has_a_combination_of_its_own_where_it_is_named() -> None:
    one, other = Scorer(4), Scorer(4)
    assert one.combination is not other.combination
    assert one.accumulator is not other.accumulator


@pytest.mark.parametrize("thing", [3, torch.tanh, "min", None, int], ids=["3", "tanh", "min", "None", "int"])
def test_what_cannot_be_wrapped(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"multipose wraps a torch\.nn\.Module or a class of them, got"):
        gradhooks.multipose("min")(thing)


def test_forgotten_parentheses() -> None:
    with pytest.raises(TypeError, match=r"got the class Bare as its combination: write @multipose\(\) above"):

        @gradhooks.multipose
        class Bare(nn.Module):
            pass


def test_unknown_options_are_an_error() -> None:
    for misspelt in (
        lambda: gradhooks.multipose("min", chunk_sise=3),  # type: ignore[call-arg]
        lambda: gradhooks.MultiPose(mlp(4, 1), chunk_sise=3),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError, match="no option 'chunk_sise'; did you mean 'chunk_size'"):
            misspelt()
    with pytest.raises(TypeError, match=r"no option 'zzz'\. The options are accumulator, call, chunk_size"):
        gradhooks.MultiPose(mlp(4, 1), zzz=3)  # type: ignore[call-arg]
    with pytest.raises(gradhooks.errors.PluginError, match="minn"):
        gradhooks.multipose("minn")(mlp(4, 1))


class WithHead(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 1)
        self.scale = 1.0

    def forward(self, pose: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self.head(pose) * self.scale
        return prediction


def test_what_is_set_on_the_wrapper_is_set_where_it_is_read() -> None:
    scorer = gradhooks.MultiPose(WithHead())
    scorer.head, scorer.scale = torch.nn.Linear(3, 2), 0.0
    combined, _ = scorer([torch.ones(3)])
    assert combined.tolist() == [0.0, 0.0]
    assert scorer.model.scale == 0.0
    assert set(scorer.state_dict()) == {"head.weight", "head.bias"}
    scorer.tolerance, scorer.forward, scorer.remark = 0.5, scorer.forward, "mine"
    assert {"tolerance", "forward", "remark"} & set(vars(scorer.model)) == set()

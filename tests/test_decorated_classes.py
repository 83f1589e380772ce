"""A class with the decorator @multipose stays a class: inheritance, help, pickling and attributes."""

import abc
import inspect
import pickle
import pydoc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_helpers import COPIES, assert_same_state
from model_zoo import mlp
from seeding import manual_seed
from torch import Tensor, nn
from training_reference import Gradients, assert_same_gradients, gradients_of, loss_on_both

import gradhooks
from gradhooks import MultiPose
from gradhooks.testing import full_graph


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
    """Scores a pose, and adds a learned shift."""

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
    """Passes its own name to `super`."""

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
def test_gradients_of_a_decorated_class(make: Callable[[], Any]) -> None:
    def train(*, multi_pose: bool) -> Gradients:
        manual_seed(3)
        scorer = make().double()
        poses = list(torch.randn(5, 4, dtype=torch.float64))
        loss_on_both(scorer(poses) if multi_pose else full_graph(scorer.model, poses, scorer.combination)).backward()
        return gradients_of(dict(scorer.named_parameters()))

    assert_same_gradients(train(multi_pose=True), train(multi_pose=False))


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


@pytest.mark.parametrize("method", COPIES)
@pytest.mark.parametrize("make", [lambda: Scorer(6), lambda: Scaled(6), Concrete])
def test_instances_are_copied_and_pickled_by_reference(make: Callable[[], Any], method: str) -> None:
    scorer = make()
    for original in (scorer, scorer.model):
        copied = COPIES[method](original)
        assert type(copied) is type(original)
        assert_same_state(copied.state_dict(), original.state_dict())
    assert type(COPIES[method](scorer).model) is type(scorer.model)
    assert pickle.loads(pickle.dumps(type(scorer.model))) is type(scorer.model)  # noqa: S301  # our own


def test_super_with_the_class_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Named.__init__ calls itself without end: .* write super\(\)"):
        Named()


def test_a_model_may_be_wrapped_instead_of_a_class() -> None:
    model = mlp(4, 6, 1)
    scorer = gradhooks.multipose("min", accumulator="stream", chunk_size=2)(model)
    assert isinstance(scorer, MultiPose)
    assert scorer.model is model
    assert (scorer.accumulator.name, scorer.chunk_size) == ("stream", 2)
    assert isinstance(scorer.combination, gradhooks.combinations.Min)


def test_each_instance_creates_its_own_combination_and_accumulator() -> None:
    one, other = Scorer(4), Scorer(4)
    assert one.combination is not other.combination
    assert one.accumulator is not other.accumulator


@pytest.mark.parametrize("value", [3, torch.tanh, "min", None, int], ids=["3", "tanh", "min", "None", "int"])
def test_something_that_is_not_a_module_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"multipose wraps a torch\.nn\.Module or a class of them, got"):
        gradhooks.multipose("min")(value)


def test_a_decorator_without_parentheses_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got the class Bare as its combination: write @multipose\(\) above"):

        @gradhooks.multipose
        class Bare(nn.Module):
            pass


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


class WithHead(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 1)
        self.scale = 1.0

    def forward(self, pose: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self.head(pose) * self.scale
        return prediction


def test_attributes_of_the_model_are_set_through_the_wrapper() -> None:
    scorer = gradhooks.MultiPose(WithHead())
    scorer.head, scorer.scale = torch.nn.Linear(3, 2), 0.0
    combined, _ = scorer([torch.ones(3)])
    assert combined.tolist() == [0.0, 0.0]
    assert scorer.model.scale == 0.0
    assert set(scorer.state_dict()) == {"head.weight", "head.bias"}
    scorer.tolerance, scorer.forward, scorer.remark = 0.5, scorer.forward, "mine"
    assert {"tolerance", "forward", "remark"} & set(vars(scorer.model)) == set()

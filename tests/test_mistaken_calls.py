"""Calls that mean something else than the user thinks are answered with an error, a question, or the report."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_state import unchanged
from torch import Tensor, nn

import gradhooks
from gradhooks import MultiPose
from gradhooks.errors import CombinationError, PosesError

OPTIONS: list[dict[str, Any]] = [{}, {"memory": 0}, {"memory": 0, "accumulator": "stream"}, {"chunk_size": 1}]


class Molecule(nn.Module):
    """Predicts one energy for a molecule, whose atoms are along axis 0."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.last, self.reduce = nn.Embedding(9, 4), nn.Linear(4, 1), reduce

    def forward(self, z: Tensor, pos: Tensor) -> Tensor:
        return self.reduce(self.last((self.embedding(z) * pos.sum(-1, keepdim=True)).tanh()))


def molecule(count: int) -> dict[str, Tensor]:
    return {"z": torch.randint(0, 9, (count,)), "pos": torch.randn(count, 3)}


@pytest.mark.parametrize("reduce", [torch.sum, lambda rows: rows.sum(0), lambda rows: rows.sum(0, keepdim=True)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_pose_as_a_mapping_is_not_sliced(options: dict[str, Any], reduce: Callable[[Tensor], Tensor]) -> None:
    model, pose = Molecule(reduce), molecule(10)
    scorer = MultiPose(model, **options)
    for grad_mode in (torch.enable_grad, torch.no_grad):
        with unchanged(model), grad_mode(), pytest.raises(PosesError, match=r"Is this mapping one pose\? .* \[pose\]"):
            scorer(pose)
    scorer([pose, molecule(3)]).combined.sum().backward()
    assert scorer.report.inputs == "2 poses, the first of shapes (10,), (10, 3)"


def test_the_question_is_asked_again_for_another_form() -> None:
    """A model that takes batches and single poses."""

    class Both(nn.Linear):
        def forward(self, poses: Tensor) -> Tensor:
            return super().forward(poses).mean(-2)

    model, runs = Both(4, 1), []
    model.register_forward_hook(lambda *_: runs.append(1))
    scorer = MultiPose(model, memory=0, accumulator="store", audit=False)
    for _ in range(3):
        scorer(torch.randn(3, 5, 4))
    assert len(runs) == 3 * 3 + 1
    with pytest.raises(PosesError, match=r"returned shape \(1,\), not two rows.*Is this tensor one pose"):
        scorer(torch.randn(5, 4))


def test_models_that_refuse_two_rows_are_believed() -> None:
    class OneByOne(nn.Linear):
        def forward(self, poses: Tensor) -> Tensor:
            assert len(poses) == 1
            return super().forward(poses)

    prediction = MultiPose(OneByOne(4, 1), memory=0)(torch.randn(3, 4))
    assert prediction.per_pose.shape == (3, 1)


@pytest.mark.parametrize("bags", [[3, 3], [2, 5, 1], [0, 2]], ids=str)
def test_groups_as_nested_lists_are_refused(bags: list[int]) -> None:
    model = nn.Linear(4, 1)
    groups = [list(torch.randn(size, 4)) for size in bags]
    with (
        unchanged(model),
        pytest.raises(PosesError, match=rf"pose 0 is a list of {bags[0]}\. .*groups=.*collate_groups"),
    ):
        MultiPose(model)(groups)


def test_a_list_may_be_a_pose_where_the_user_says_so() -> None:
    def call(model: nn.Module, pose: list[Tensor]) -> Tensor:
        prediction: Tensor = model(torch.stack(pose)).mean(0)
        return prediction

    poses = [list(torch.randn(size, 4)) for size in (3, 2)]
    assert MultiPose(nn.Linear(4, 1), call=call)(poses).combined.shape == (1,)
    numbers = MultiPose(nn.Linear(4, 1), call=lambda model, pose: model(torch.tensor(pose)))([[0.1, 0.2, 0.3, 0.4]] * 2)
    assert numbers.combined.shape == (1,)


def weighted(predictions: Tensor, *, mask: Tensor, temperature: float = 1.0) -> Tensor:
    return (predictions * mask.unsqueeze(1)).sum(0) / temperature


@pytest.mark.parametrize(
    ("combination", "message"),
    [
        ("mean", "the combination Mean takes weights=; got index="),
        ("boltzmann", "the combination Boltzmann takes weights=; got index="),
        (None, "the combination none takes no keywords; got index="),
        (weighted, "the combination weighted takes mask= and temperature=; got index="),
    ],
)
def test_an_unknown_keyword_is_refused_before_any_pose_runs(combination: Any, message: str) -> None:
    model = nn.Linear(4, 1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pose ran"))
    with pytest.raises(CombinationError, match=rf"{message}.*groups="):
        MultiPose(model, combination)(torch.randn(3, 4), index=torch.tensor([0, 0, 1]))


def test_keywords_that_a_combination_takes() -> None:
    class Any_(gradhooks.Combination):  # noqa: N801
        def forward(self, predictions: Tensor, **arguments: Any) -> Tensor:
            return predictions.sum(0) * arguments["anything"]

    poses = torch.randn(3, 4)
    MultiPose(nn.Linear(4, 1), Any_())(poses, anything=2.0)
    MultiPose(nn.Linear(4, 1), weighted)(poses, mask=torch.ones(3))
    with pytest.raises(TypeError, match="mean"):  # no signature can be read
        MultiPose(nn.Linear(4, 1), torch.mean)(poses, index=1)


def test_the_report_says_which_poses_were_seen() -> None:
    scorer = MultiPose(nn.Linear(16, 1))
    for poses, inputs in (
        (torch.randn(4, 5, 16), "4 poses of shape (5, 16)"),
        (list(torch.randn(4, 5, 16)), "4 poses of shape (5, 16)"),
        (torch.randn(1, 16), "1 pose of shape (16,)"),
        (iter([torch.randn(2, 16).mean(0), torch.randn(16)]), "2 poses of shape (16,)"),
        (list(torch.randn(70, 16)), "70 poses, the first of shape (16,)"),
    ):
        scorer(poses)
        assert scorer.report.inputs == inputs
        assert inputs in str(scorer.report)


def test_a_decorated_lightning_module_is_refused_with_the_way_out() -> None:
    base = type("LightningModule", (nn.Module,), {})  # known by its name, since importing Lightning takes seconds
    with pytest.raises(TypeError, match=r"Task is a LightningModule.*self\.scorer = gradhooks\.MultiPose\(network\)"):
        gradhooks.multipose("mean")(type("Task", (base,), {}))

"""Train the same model by groups and by the full graph, with the same code, and compare the gradients."""

from collections.abc import Callable, Iterable

from model_zoo import ModelCase, TensorFactory, build
from training_reference import (
    ACCUMULATORS_AND_PLAIN,
    COMBINATIONS,
    Gradients,
    assert_same_gradients,
    case_label,
    gradients_of,
    options_of,
    trained_leaves,
)

from gradhooks import MultiPose, MultiPosePrediction
from gradhooks.testing import full_graph

# The first is scale dependent, the second has a parameter.
CASE_COMBINATIONS = ["min of scale 1", "boltzmann learnable"]
# Plain; with a parameter that gets two gradients per pose; with a graph that begins outside of the model.
CASE_MODELS = ["plain_mlp", "tied_weights", "shared_encoder_output"]


class BackwardCase:
    """A model of the zoo with a combination.

    Args:
        name: The model.
        combination: The name of the combination.
        accumulator: One of `ACCUMULATORS_AND_PLAIN`, or None for the full graph.
        factory: Device and dtype of the model.

    Attributes:
        scorer: The wrapped model, or None for the full graph.
        leaves: All leaves that are trained, by name.
    """

    def __init__(self, name: str, combination: str, accumulator: str | None, factory: TensorFactory) -> None:
        self.accumulator = accumulator
        self.model_case: ModelCase = build(name, factory)
        self.combination = COMBINATIONS[combination]()
        self.leaves = trained_leaves(self.model_case, self.combination)
        self.scorer: MultiPose | None = None
        if accumulator is not None:
            self.scorer = MultiPose(
                self.model_case.model, self.combination, call=self.model_case.call, **options_of(accumulator)
            )

    def predict(self, count: int = 5, first: int = 0) -> MultiPosePrediction:
        """Return the prediction of `count` poses from the pose `first` on."""
        poses = self.model_case.make_poses(first + count)[first:]
        if self.scorer is not None:
            return self.scorer(poses)
        return full_graph(self.model_case.model, poses, self.combination, call=self.model_case.call)

    @property
    def gradients(self) -> Gradients:
        return gradients_of(self.leaves)


Train = Callable[[BackwardCase], object]


def assert_gradients_of_full_graph(
    train: Train,
    name: str,
    combination: str,
    factory: TensorFactory,
    accumulators: Iterable[str] = ACCUMULATORS_AND_PLAIN,
) -> dict[str, BackwardCase]:
    """Assert that `train` leaves the gradients of the full graph with each accumulator, and where poses run plainly.

    On a first group, "auto" delegates to one of the others (`test_auto.py`), so that it may be left out of
    `accumulators` unless `train` runs several groups or backwards.

    Returns:
        The trained cases by accumulator; the full graph by "full graph".
    """
    reference = BackwardCase(name, combination, None, factory)
    train(reference)
    cases = {"full graph": reference}
    for accumulator in accumulators:
        with case_label(accumulator):
            cases[accumulator] = BackwardCase(name, combination, accumulator, factory)
            train(cases[accumulator])
            assert_same_gradients(cases[accumulator].gradients, reference.gradients)
    return cases

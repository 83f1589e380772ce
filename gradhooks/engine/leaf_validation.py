"""LeafValidator: refuses predictions that depend on leaves whose gradients cannot be intercepted."""

from typing import Any, NoReturn

from torch import Tensor, nn

from gradhooks.engine.accumulation import Chunk
from gradhooks.engine.batch import Batch
from gradhooks.engine.graph_leaves import leaves_inside_checkpoint, other_leaves, reached_leaves
from gradhooks.engine.leaves import Leaves
from gradhooks.engine.model_state import ModelState
from gradhooks.engine.nested import tensors_in
from gradhooks.engine.pose_inputs import Poses
from gradhooks.engine.pose_runner import PoseRunner
from gradhooks.engine.tensor_names import tensors_of_modules
from gradhooks.errors import PredictionError, UnregisteredTensorError


class LeafValidator:
    """Runs chunks with a graph, and inspects which leaves each graph reaches.

    A leaf that the model creates in its forward (positions by which it differentiates) is another tensor in each run
    and is ignored. A leaf that a second run reaches again persists, so the full graph would have trained it.

    Args:
        model: The bare model, for names in messages.
        runner: Runs the model.
        leaves: The leaves that have shadows.
        state: Restores the model state around additional runs.
    """

    def __init__(self, model: nn.Module, runner: PoseRunner, leaves: Leaves, state: ModelState) -> None:
        self._model = model
        self._runner = runner
        self._leaves = leaves
        self._state = state
        self._has_run = self._inspected_checkpoints = False
        self._shadow_nodes: frozenset[Any] = frozenset()

    def run(self, poses: Poses, chunk: Chunk) -> Tensor:
        """Return the predictions of a chunk, with their graph.

        Raises:
            UnregisteredTensorError: They depend on a parameter, or on a persistent tensor, that has no shadow.
            PredictionError: The model called `backward()`.
        """
        predictions = self._run(poses, chunk)
        # Inspecting the inside of reentrant checkpoints costs a forward, so it is done once per batch.
        inside, self._inspected_checkpoints = not self._inspected_checkpoints, True
        unregistered = self._unregistered_leaves(predictions, inside_checkpoints=inside)
        if not unregistered:
            return predictions
        self._refuse([leaf for leaf in unregistered if isinstance(leaf, nn.Parameter)], chunk)
        if not self._runner.detaches_inputs:
            del predictions
            self._runner.detach_inputs(self._leaves)
            with self._state.preserved():  # restores running statistics, which `chunk.before` may not contain
                self._state.restore(chunk.before)
                predictions = self._run(poses, chunk)
            known = {id(leaf) for leaf in unregistered}
            second = self._unregistered_leaves(predictions, inside_checkpoints=inside)
            self._refuse([leaf for leaf in second if id(leaf) in known], chunk)
        return predictions

    def reached_leaves(self, predictions: Tensor) -> list[Tensor]:
        """Return the leaves below `predictions`, also inside reentrant checkpoints (which costs one more forward)."""
        leaves, checkpoints = reached_leaves(predictions)
        if checkpoints:
            with self._state.preserved():
                leaves += [leaf for checkpoint in checkpoints for leaf in leaves_inside_checkpoint(checkpoint)]
        return leaves

    def _run(self, poses: Poses, chunk: Chunk) -> Tensor:
        is_first, self._has_run = not self._has_run, True
        before = self._leaves.gradient_fingerprint()
        predictions = self._runner.run(poses, chunk.start, chunk.stop)
        # Before the first run of a batch, no shadow has a gradient.
        if self._leaves.gradient_fingerprint() != before or (is_first and self._leaves.have_gradients):
            raise PredictionError(
                f"pose {chunk.start}: the model calls backward() in its forward, which adds to the gradients of its "
                "parameters at every call; use torch.autograd.grad(..., create_graph=True) for derivatives that the "
                "prediction needs"
            )
        return predictions

    def _unregistered_leaves(self, predictions: Tensor, *, inside_checkpoints: bool) -> list[Tensor]:
        if not inside_checkpoints:  # the first run of the audit must not hold nodes
            self._shadow_nodes = self._shadow_nodes or self._leaves.nodes()
        nodes = self._shadow_nodes or self._leaves.nodes()
        leaves, has_checkpoints = other_leaves(predictions, nodes, checkpoints=inside_checkpoints)
        if has_checkpoints:
            leaves = [leaf for leaf in self.reached_leaves(predictions) if not self._leaves.contain(leaf)]
        return leaves

    def _refuse(self, leaves: list[Tensor], chunk: Chunk) -> None:
        if leaves:
            _refuse(self._model, leaves, chunk.start)


def refuse_outside_leaves(batch: Batch, predictions: Tensor, start: int) -> None:
    """Refuse predictions that depend on a leaf outside the model, although neither the model nor a pose is trained.

    Leaves that the model makes, or marks, in its forward are other tensors in each run.

    Args:
        batch: The batch.
        predictions: Live predictions of some poses.
        start: The index of the first of these poses.

    Raises:
        UnregisteredTensorError: They do.
    """
    if not predictions.requires_grad:
        return
    own = {id(tensor) for _, tensor in tensors_in(batch.poses.slice(start, start + len(predictions)))}
    leaves = [leaf for leaf in reached_leaves(predictions)[0] if id(leaf) not in own]
    if leaves:
        with batch.parts.state.preserved():
            again = batch.runner.run(batch.poses, start, start + len(predictions))
        persistent = set(map(id, reached_leaves(again)[0]))
        outside = [leaf for leaf in leaves if id(leaf) in persistent]
        if outside:
            _refuse(batch.model, outside, start)


def _refuse(model: nn.Module, leaves: list[Tensor], start: int) -> NoReturn:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = [names[id(leaf)] for leaf in leaves if id(leaf) in names]
    if made:
        raise UnregisteredTensorError(
            f"pose {start}: the model made or unfroze {', '.join(made)} in this forward, which gradhooks cannot "
            "intercept in the same batch; unfreeze it, or make it by a plain forward, before the call"
        )
    held = tensors_of_modules(model)
    described = ", ".join(held.get(id(leaf), "") + _describe(leaf) for leaf in leaves)
    raise UnregisteredTensorError(
        f"the prediction of pose {start} depends on {described}, which gradhooks cannot intercept: it is neither a "
        "registered parameter of the model nor a tensor found in the pose. Register it (nn.Parameter as a module "
        "attribute, or nn.ParameterList), pass it as part of the pose (tensor, mapping, tuple, dataclass), detach it, "
        "or allow enough memory= for poses to run plainly"
    )


def _describe(leaf: Tensor) -> str:
    kind = "a parameter" if isinstance(leaf, nn.Parameter) else "a tensor that requires grad"
    return f"{kind} of shape {tuple(leaf.shape)}"

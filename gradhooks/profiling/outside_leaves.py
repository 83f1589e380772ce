"""OutsideLeaves: leaves that a loss reaches and that are neither in the model nor in the poses."""

from collections.abc import Iterable

from torch import Tensor, nn

from gradhooks.engine.graph_leaves import reached_leaves


class OutsideLeaves:
    """Finds leaves that functions close over. They are the user's own, so their `.grad` is put back.

    Args:
        model: The model of which copies are run.

    Attributes:
        by_name: The leaves, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._parameters = dict(model.named_parameters())
        self._is_first = True
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def find(self, loss: Tensor, known: Iterable[Tensor]) -> None:
        """Find those below `loss` that are not among `known`, and set the `.grad` of new ones to None.

        A leaf that is not found each time is made in the forward, another one in each, and is forgotten.

        Raises:
            TypeError: A parameter of the model itself is among them: the copy is not independent.
        """
        others = set(map(id, known))
        found: list[Tensor] = []
        originals = {id(leaf): name for name, leaf in self._parameters.items()}
        for leaf in reached_leaves(loss)[0]:
            if id(leaf) in originals:
                raise TypeError(
                    f"gradcheck compares copies of the model, and the copy uses the parameter {originals[id(leaf)]} of "
                    "the original: a function in an attribute, a hook, call= or loss= closes over the model. Let it "
                    "get the model as an argument, or make it a method; a loss may have a second argument, the model"
                )
            if id(leaf) not in others:
                found.append(leaf)
        if self._is_first:
            self._gradients = [(leaf, leaf.grad) for leaf in found]
            self.by_name = {
                f"leaf {n} outside the model, shape {tuple(leaf.shape)}": leaf for n, leaf in enumerate(found)
            }
            for leaf in found:
                leaf.grad = None
        else:
            ids = set(map(id, found))
            self.by_name = {name: leaf for name, leaf in self.by_name.items() if id(leaf) in ids}
        self._is_first = False

    def restore(self) -> None:
        """Put back the user's `.grad`."""
        for leaf, gradient in self._gradients:
            leaf.grad = gradient

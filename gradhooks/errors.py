"""Exceptions of gradhooks, each named after what has to change.

Every class also derives from the builtin exception that PyTorch raises for errors of this kind.
"""


class GradhooksError(Exception):
    """Base class of every exception that gradhooks raises on purpose."""


class PosesError(GradhooksError, ValueError):
    """Change the poses: the group is empty, its poses disagree in shape, or it is not a group of poses."""


class PredictionError(GradhooksError, ValueError):
    """Change `call=` or the model: the model's output cannot be used as a prediction."""


class UnregisteredTensorError(GradhooksError, RuntimeError):
    """Register the tensor: a prediction depends on a leaf tensor whose gradient cannot be intercepted."""


class ReplayError(GradhooksError, RuntimeError):
    """Make the model repeatable, or use an accumulator that runs each pose once: a second run gave another result."""


class OutlivingGraphError(GradhooksError, RuntimeError):
    """Detach the tensor, or return it as `side`: a tensor with a graph outlives the forward of an intercepted pose."""


class NonlinearBackwardError(GradhooksError, RuntimeError):
    """Use accumulator="auto" or "recompute": the backward of the model is not linear in its cotangent."""


class ConcurrentUseError(GradhooksError, RuntimeError):
    """Give each thread its own copy of the model: two groups cannot run through one model at the same time."""


class DistributedError(GradhooksError, RuntimeError):
    """Several processes: wrap the modules in another order, or repair the rank that the message names."""


class HigherOrderError(GradhooksError, RuntimeError):
    """Use the full graph for this step: the accumulated gradient cannot be differentiated again."""


class CombinationError(GradhooksError, ValueError):
    """Repair the combination or its arguments: they do not satisfy the contract of `gradhooks.Combination`."""


class PluginError(GradhooksError, LookupError):
    """Install, repair or rename a plugin: a registered name could not be turned into an object."""


class GradhooksWarning(UserWarning):
    """The step costs more than it should. The gradient is correct."""

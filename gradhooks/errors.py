"""What can go wrong, one class for each way out.

Every class is also the builtin that PyTorch users would catch for such a fault.
"""


class GradhooksError(Exception):
    """Base of every error that gradhooks raises on purpose."""


class PosesError(GradhooksError, ValueError):
    """Change the poses: the group is empty, ragged where it must not be, or not a group at all."""


class PredictionError(GradhooksError, ValueError):
    """Change `call=` or the model: what came out is no usable prediction."""


class UnregisteredTensorError(GradhooksError, RuntimeError):
    """Register the tensor: the prediction depends on a leaf that gradhooks cannot intercept."""


class ReplayError(GradhooksError, RuntimeError):
    """Make the model repeatable, or choose an accumulator that runs every pose once."""


class ConcurrentUseError(GradhooksError, RuntimeError):
    """Give each thread a model of its own: two groups cannot be in one model at once."""


class DistributedError(GradhooksError, RuntimeError):
    """Several processes: wrap the other way round, or mend the rank that has failed, which the message names."""


class HigherOrderError(GradhooksError, RuntimeError):
    """Use the full graph for this step: derivatives of the delivered gradient do not exist."""


class CombinationError(GradhooksError, ValueError):
    """Mend the combination: it returned something that its contract excludes."""


class PluginError(GradhooksError, LookupError):
    """Install, mend or rename a plugin: a name could not be turned into an object."""


class GradhooksWarning(UserWarning):
    """Something costs more than it should; the gradient is right all the same."""

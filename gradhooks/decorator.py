"""`@gradhooks.multipose(...)`: a class whose instances are born wrapped."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from gradhooks.wrapper import MultiPose


def multipose(combination: Any = "mean", **options: Any) -> Callable[[Any], Any]:
    """Wrap a class of models, or one model, in `MultiPose`.

    A decorated class stays a class: calling it makes a `MultiPose` around a bare instance, of which `isinstance` with
    the class is true; subclasses define the forward of one pose, and are wrapped too.

    Args:
        combination: As for `MultiPose`.
        **options: As for `MultiPose`.

    Returns:
        A decorator for a subclass of `torch.nn.Module`; of an instance it makes a `MultiPose`.
    """
    if isinstance(combination, type) and issubclass(combination, nn.Module):
        raise TypeError(
            f"multipose got the class {combination.__name__} as its combination: write @multipose() above a model "
            "class, and pass a combination by name or as an instance"
        )

    def wrap(model: Any) -> Any:
        if isinstance(model, nn.Module):
            return MultiPose(model, combination, **options)
        if isinstance(model, type) and issubclass(model, nn.Module):
            return _decorated(model, functools.partial(MultiPose, combination=combination, **options))
        raise TypeError(f"multipose wraps a torch.nn.Module or a class of them, got {model!r}")

    return wrap


class MultiPoseClass(type):
    """Class of decorated classes: calling one makes a bare instance and wraps it.

    A metaclass, and not a function or a subclass of `MultiPose` in the class's place, so that subclasses, `super()`,
    pickling by reference and `isinstance` mean the bare model, whose class this still is.
    """

    _wrap: Callable[[nn.Module], MultiPose]

    def __call__(cls, *args: Any, **kwargs: Any) -> MultiPose:
        try:
            bare = super().__call__(*args, **kwargs)
        except RecursionError as fault:
            name = cls.__name__
            raise TypeError(
                f"{name}.__init__ calls itself without end: in a decorated class write super(), since in "
                f"super({name}, self) the name {name} means the decorated class"
            ) from fault
        return cls._wrap(bare)

    def __instancecheck__(cls, instance: object) -> bool:
        if isinstance(instance, MultiPose):
            instance = instance.model
        return super().__instancecheck__(instance)

    @property
    def __signature__(cls) -> inspect.Signature:
        parameters = list(inspect.signature(cls.__init__).parameters.values())  # type: ignore[misc]
        return inspect.Signature(parameters[1:])


def _decorated(model: type[nn.Module], wrap: Callable[[nn.Module], MultiPose]) -> type[nn.Module]:
    metaclass: type = MultiPoseClass
    if not issubclass(metaclass, type(model)):  # the class has a metaclass of its own, as abstract classes do
        metaclass = type("MultiPoseClass", (MultiPoseClass, type(model)), {})
    names = {name: getattr(model, name) for name in ("__module__", "__qualname__", "__doc__")}
    return metaclass(model.__name__, (model,), {**names, "_wrap": staticmethod(wrap)})  # type: ignore[no-any-return]

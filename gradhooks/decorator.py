"""`@gradhooks.multipose(...)`: a class of models whose instances are wrapped in `MultiPose`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, overload

from torch import Tensor, nn
from typing_extensions import Unpack

from gradhooks.accumulators.base import Accumulator
from gradhooks.options import OPTION_NAMES, OptionTypes, refuse_unknown_options
from gradhooks.wrapper import MultiPose

P = ParamSpec("P")
ModelT = TypeVar("ModelT", bound=nn.Module)

if TYPE_CHECKING:

    class DecoratedModel(MultiPose[ModelT], Generic[P, ModelT]):
        """What a type checker sees of a decorated class: constructed as the class is, and used as a `MultiPose`."""

        forward: Callable[..., Any]  # a subclass defines the forward of one pose

        def __init__(self, *args: P.args, **kwargs: P.kwargs) -> None: ...

        def __getattr__(self, name: str) -> Any: ...  # type: ignore[override]


class Decorator(Protocol):
    """What `multipose` returns."""

    @overload
    def __call__(self, model: ModelT) -> MultiPose[ModelT]: ...
    @overload
    def __call__(self, model: Callable[P, ModelT]) -> "type[DecoratedModel[P, ModelT]]": ...


def multipose(
    combination: str | Callable[[Tensor], Tensor] | None = "mean",
    *,
    combination_options: Mapping[str, Any] | None = None,
    accumulator: str | Accumulator = "auto",
    **options: Unpack[OptionTypes],
) -> Decorator:
    """Wrap a class of models, or one model, in `MultiPose`.

    A decorated class stays a class. Calling it makes a `MultiPose` around a bare instance, for which `isinstance` with
    the class is true. Subclasses define the forward of one pose and are wrapped too.

    Args:
        combination: As for `MultiPose`.
        combination_options: As for `MultiPose`.
        accumulator: As for `MultiPose`.
        **options: As for `MultiPose`.

    Returns:
        A decorator for a subclass of `torch.nn.Module`; for an instance it returns a `MultiPose`.

    Raises:
        TypeError: An option does not exist, or a class was passed as the combination; or the class is a
            `LightningModule`.
    """
    given: object = combination
    if isinstance(given, type) and issubclass(given, nn.Module):
        raise TypeError(
            f"multipose got the class {given.__name__} as its combination: write @multipose() above a model "
            "class, and pass a combination by name or as an instance"
        )
    refuse_unknown_options(options, ["accumulator", "combination_options", *OPTION_NAMES])
    of_plugins: dict[str, Any] = {"combination_options": combination_options, "accumulator": accumulator}

    def wrap(model: Any) -> Any:
        if isinstance(model, nn.Module):
            return MultiPose(model, combination, **of_plugins, **options)
        if isinstance(model, type) and issubclass(model, nn.Module):
            _refuse_lightning_module(model)
            return _decorated(model, functools.partial(MultiPose, combination=combination, **of_plugins, **options))
        raise TypeError(f"multipose wraps a torch.nn.Module or a class of them, got {model!r}")

    return wrap


def _refuse_lightning_module(model: type[nn.Module]) -> None:
    """Refuse a class whose instances belong to a Trainer of Lightning, which takes no `MultiPose`."""
    if any(base.__name__ == "LightningModule" for base in model.__mro__):
        raise TypeError(
            f"{model.__name__} is a LightningModule: a Trainer takes no MultiPose in its place, and its own steps "
            "would call the forward of one pose. Wrap the network inside it: in __init__ "
            "self.scorer = gradhooks.MultiPose(network), and in training_step self.scorer(poses)"
        )


class MultiPoseClass(type):
    """The metaclass of decorated classes: calling one makes a bare instance and wraps it.

    It is a metaclass, instead of a function or a subclass of `MultiPose` in place of the class, so that subclasses,
    `super()`, pickling by reference and `isinstance` refer to the bare model, whose class this remains.
    """

    _wrap: Callable[[nn.Module], MultiPose[Any]]

    def __call__(cls, *args: Any, **kwargs: Any) -> MultiPose[Any]:
        try:
            bare = super().__call__(*args, **kwargs)
        except RecursionError as error:
            name = cls.__name__
            raise TypeError(
                f"{name}.__init__ calls itself without end: in a decorated class write super(), since in "
                f"super({name}, self) the name {name} refers to the decorated class"
            ) from error
        return cls._wrap(bare)

    def __instancecheck__(cls, instance: object) -> bool:
        if isinstance(instance, MultiPose):
            instance = instance.model
        return super().__instancecheck__(instance)

    @property
    def __signature__(cls) -> inspect.Signature:
        parameters = list(inspect.signature(cls.__init__).parameters.values())  # type: ignore[misc]
        return inspect.Signature(parameters[1:])


def _decorated(model: type[nn.Module], wrap: Callable[[nn.Module], MultiPose[Any]]) -> type[nn.Module]:
    metaclass: type = MultiPoseClass
    if not issubclass(metaclass, type(model)):  # the class has a metaclass of its own, as abstract classes do
        metaclass = type("MultiPoseClass", (MultiPoseClass, type(model)), {})
    names = {name: getattr(model, name) for name in ("__module__", "__qualname__", "__doc__")}
    return metaclass(model.__name__, (model,), {**names, "_wrap": staticmethod(wrap)})  # type: ignore[no-any-return]

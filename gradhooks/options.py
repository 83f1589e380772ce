"""Options: the settings of a `MultiPose`, validated when they are set, and frozen."""

import copy
import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, get_args, overload

from torch import Tensor, nn
from typing_extensions import Self, TypedDict

from gradhooks.distributed.collectives import Collectives
from gradhooks.random_state import user_sources
from gradhooks.units import parse_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

Call = Callable[[nn.Module, Any], Tensor]
ChunkSize = int | None
Collate = Callable[[list[Any]], Any]
Progress = bool | Callable[[int, int], object]
Nonfinite = Literal["propagate", "raise", "drop"]


def call_model(model: nn.Module, pose: Any) -> Tensor:
    """Pass a tuple as `model(*pose)`, a mapping as `model(**pose)` and anything else as `model(pose)`.

    This is the default of the option `call`.
    """
    if isinstance(pose, tuple):
        return model(*pose)  # type: ignore[no-any-return]
    if isinstance(pose, Mapping):
        return model(**pose)  # type: ignore[no-any-return]
    try:
        return model(pose)  # type: ignore[no-any-return]
    except TypeError as error:
        if isinstance(pose, list) and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                "gradhooks: a list is passed as one argument, a tuple as model(*pose). If the poses were tuples, the "
                "default collate function of the DataLoader has turned them into lists: use DataLoader(..., "
                "batch_size=None, collate_fn=lambda group: group)"
            )
        raise


class OptionTypes(TypedDict, total=False):
    """The types of the options, for `Unpack`."""

    memory: str | float
    chunk_size: ChunkSize
    collate: Collate | None
    call: Call | None
    tolerance: float | None
    nonfinite: Nonfinite
    generators: Iterable[object]
    process_group: "ProcessGroup | DeviceMesh | None"
    audit: bool
    progress: Progress


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The settings of a `MultiPose`, documented there.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value has the wrong type.
        ModuleNotFoundError: `progress` is True and tqdm is not installed.
        DistributedError: This process is not in `process_group`.
    """

    memory: str | float = "1GiB"
    chunk_size: ChunkSize = None
    collate: Collate | None = None
    call: Call = call_model
    tolerance: float | None = None
    nonfinite: Nonfinite = "propagate"
    generators: tuple[object, ...] = ()
    process_group: "ProcessGroup | DeviceMesh | None" = None
    audit: bool = True
    progress: Progress = False

    def __post_init__(self) -> None:
        self._convert("call", call_model if self.call is None else self.call)
        self._convert("generators", tuple(self.generators))
        self._convert("chunk_size", _chunk_size(self.chunk_size))
        parse_bytes(self.memory)
        _check_progress(self.progress)
        user_sources(self.generators)
        Collectives(self.process_group)
        for name in ("call", "collate"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {getattr(self, name)!r}")
        if not isinstance(self.audit, bool):
            raise TypeError(f"audit must be True or False, got {self.audit!r}")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), relative to the largest coefficient, got {self.tolerance}")
        if self.nonfinite not in get_args(Nonfinite):
            raise ValueError(f"nonfinite must be one of {', '.join(get_args(Nonfinite))}, got {self.nonfinite!r}")

    def _convert(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def changed(self, **options: Any) -> "Options":
        """Return a copy with some options changed, validated."""
        return Options(**{**self._asdict(), **options})

    def changed_from_default(self) -> set[str]:
        """Return the names of the options whose values are not the defaults."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default}

    def _asdict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Options":
        memo[id(self.process_group)] = self.process_group  # a copy of a model uses the same ranks
        return Options(**{name: copy.deepcopy(value, memo) for name, value in self._asdict().items()})

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "a MultiPose with a process_group cannot be pickled, since no other process has that group; save its "
                "state_dict(), or pickle its bare model (.model)"
            )
        return self.__dict__


class HasOptions(Protocol):
    """An object whose options can be replaced."""

    options: Options

    def _change_option(self, name: str, value: Any) -> None: ...


class Option(Generic[T]):
    """An attribute that reads one option of its object, and replaces it, validated, when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: HasOptions, owner: type) -> T: ...
    def __get__(self, instance: HasOptions | None, owner: type) -> Self | T:
        return self if instance is None else getattr(instance.options, self._name)

    def __set__(self, instance: HasOptions, value: T) -> None:
        instance._change_option(self._name, value)


class OptionAttributes:
    """The options as attributes of an object that has options."""

    memory = Option[str | float]()
    chunk_size = Option[ChunkSize]()
    collate = Option[Collate | None]()
    call = Option[Call]()
    tolerance = Option[float | None]()
    nonfinite = Option[Nonfinite]()
    generators = Option[tuple[object, ...]]()
    process_group = Option["ProcessGroup | DeviceMesh | None"]()
    audit = Option[bool]()
    progress = Option[Progress]()


OPTION_NAMES = tuple(field.name for field in fields(Options))


def refuse_unknown_options(options: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuse an option that does not exist.

    Raises:
        TypeError: It names the closest option, and all of them.
    """
    names = sorted(known)
    for name in options:
        if name not in names:
            closest = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {closest[0]!r}?" if closest else "."
            raise TypeError(f"MultiPose has no option {name!r}{hint} The options are {', '.join(names)}")


def _chunk_size(value: Any) -> ChunkSize:
    if value is None:
        return None
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if size < 1 or isinstance(value, bool):
        raise ValueError(
            f"chunk_size must be at least 1, or None to take as many poses as fit in memory=, got {value!r}"
        )
    return size


def _check_progress(progress: Progress) -> None:
    if not (isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be a bool or a function of (done, total), got {progress!r}")
    if progress is True and find_spec("tqdm") is None:
        raise ModuleNotFoundError(
            "progress=True shows a bar of tqdm, which is not installed: pip install tqdm, or pass a function of "
            "(done, total)",
            name="tqdm",
        )

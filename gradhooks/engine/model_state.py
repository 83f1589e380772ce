"""ModelState: all that a forward may change besides gradients, and that a second run must find as it was.

That is: buffers, frozen parameters, and trainable ones that a forward writes (`parameter_values.py`); training flags,
plain attributes of modules and the containers in them (`module_attributes.py`); the random generators of PyTorch, of
numpy and of Python, those in attributes and those of the option `generators`.

Rules:
    1. A snapshot is taken before each chunk. What did not change is shared with the snapshot before, so a model that
       changes nothing costs one snapshot and a comparison in a few calls of C for each chunk. Of what did change, each
       snapshot keeps a copy.
    2. What a forward changes is found out. The outermost `preserved` begins a batch; what changed before was changed by
       somebody else. A module that changed between two snapshots is recorded anew before each chunk from then on.
    3. In the first batch, and the first one in another mode (training flags), whole contents are compared before each
       chunk. Later, only what is known to change is recorded before each chunk; the rest is compared at the beginning
       of a batch and in `unchanged_since`: identities, numbers and strings, lengths, and of tensors what shows
       (`TensorRecord`), in `unchanged_since` the whole contents on the CPU. If that finds something new, `noticed_late`
       says so, and the batch has to start again.
    4. A forward of a normalization layer in training writes the running statistics and does not read them, so a second
       run does not need their old values. They are still restored after a second run.
    5. Not recorded: objects of installed packages that are no modules and no containers, and tensors with a graph.
"""

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradhooks.engine.generator_states import GeneratorStates, devices_in_use
from gradhooks.engine.module_attributes import ModuleRecord, Thoroughness
from gradhooks.engine.module_values import ModuleValues
from gradhooks.engine.module_watch import modules_in_use
from gradhooks.engine.parameter_records import ParameterRecords
from gradhooks.engine.parameter_values import ParameterValues
from gradhooks.engine.plain_objects import PlainObjects
from gradhooks.engine.running_statistics import RunningStatistics, StatisticsCopy, write_statistics
from gradhooks.errors import ReplayError
from gradhooks.random_state import RandomSource, default_source, global_sources, user_sources


class Snapshot(NamedTuple):
    """The state at one time.

    Attributes:
        random: The state of each random source.
        modules: What each module holds.
        parameters: The values of the parameters.
        statistics: Running statistics that a forward only writes (Rule 4); empty in a snapshot without them.
    """

    random: tuple[Any, ...]
    modules: tuple[ModuleRecord, ...]
    parameters: ParameterRecords
    statistics: tuple[StatisticsCopy, ...] = ()


class ModelState:
    """Takes and restores snapshots of all that a forward may change besides gradients.

    Kept while the model has the same modules and parameters, or shadows in their places.

    Args:
        model: The model.
        generators: Random sources in addition to those that are found; see `user_sources`.

    Attributes:
        devices: The devices in use.
        noticed_late: Whether `unchanged_since` found changes that snapshots since then may lack (Rule 3).
    """

    def __init__(self, model: nn.Module, generators: Iterable[object] = ()) -> None:
        modules = modules_in_use(model)
        self.devices = devices_in_use(model)
        self._random = GeneratorStates([
            *map(default_source, self.devices), *global_sources(), *user_sources(generators)
        ])  # fmt: skip
        self._statistics = RunningStatistics(modules.values())
        self._modules = ModuleValues([*modules.values(), PlainObjects(modules.values())])
        self._parameters = ParameterValues(modules)
        self._latest: Snapshot | None = None
        self._known_modes: set[tuple[bool, ...]] = set()  # for which it is known what forwards change
        self._is_first_in_mode = True
        self._depth = 0
        self.noticed_late = False
        self._lost: list[str] = []
        self._before: Snapshot | None = None

    def snapshot(self, *, statistics: bool = False) -> Snapshot:
        """Return the state on which a later forward depends; with `statistics` also running statistics (Rule 4)."""
        if self._latest is None:
            self._begin()
        if self._depth > 0 and not (statistics or self._is_first_in_mode):
            return self._combine(
                self._random.snapshot(every=False),
                self._modules.snapshot_changing("signs"),
                self._parameters.snapshot_changing(),
            )
        latest = self._take(self._thoroughness, every_generator=self._is_first_in_mode)
        return latest._replace(statistics=self._statistics.read()) if statistics else latest

    def restore(self, snapshot: Snapshot) -> None:
        """Put everything back as it was.

        Raises:
            ReplayError: A forward changed a parameter of which there is no copy (`parameter_values.py`, Rule 4).
        """
        self._restore(snapshot, every_generator=self._is_first_in_mode)

    def unchanged_since(self, snapshot: Snapshot) -> bool:
        """Return whether no forward changed anything since a snapshot with statistics; False if unknown.

        False also if the state changed and is now as it was: a chunk in between found another one.
        """
        known = self._change_count
        now = self._take("everything" if self._is_first_in_mode else "cpu", every_generator=True)
        self.noticed_late = not self._is_first_in_mode and self._change_count > known
        return (
            _are_identical(now.random, snapshot.random)
            and _are_identical(now.modules, snapshot.modules)
            and now.parameters is snapshot.parameters
            and self._statistics.equal(snapshot.statistics)
        )

    @contextmanager
    def preserved(self, *, only_on_error: bool = False, probe: bool = False) -> Iterator[Snapshot]:
        """Restore the state at the end of the block, or only if the block raises; yields the snapshot.

        Args:
            only_on_error: Whether to keep what a block changes that does not raise.
            probe: Whether to copy all trainable parameters for the block, if it is the outermost one, and to find out
                which ones a forward changes. Without, only a new memory (`.data = ...`) can be undone of large ones
                that no forward changed before.
        """
        before = self._begin(copy_all=probe) if self._depth == 0 else self.snapshot(statistics=True)
        succeeded = False
        self._depth += 1
        try:
            yield before
            succeeded = True
        finally:
            self._depth -= 1
            if succeeded and only_on_error:
                self._note_last_forward()
            else:
                self._restore(before, every_generator=True, may_raise=succeeded)
            if self._depth == 0 and succeeded and self._is_first_in_mode:
                self._is_first_in_mode = False
                self._known_modes.add(self._modules.training_flags)

    @property
    def training_flags(self) -> tuple[bool, ...]:
        """The training flag of each module."""
        return self._modules.training_flags

    def add_generators(self, generators: Iterable[RandomSource]) -> None:
        """Record and restore these generators, too, from now on."""
        for generator in generators:
            self._random.add(generator)

    @property
    def found_generators(self) -> list[RandomSource]:
        """Those that were added."""
        return self._random.found

    def _note_last_forward(self) -> None:
        if self._is_first_in_mode:
            self.snapshot()  # finds out what it changed

    @property
    def _thoroughness(self) -> Thoroughness:
        return "everything" if self._is_first_in_mode else "signs"

    def _begin(self, *, copy_all: bool = False) -> Snapshot:
        """Begin a batch (Rule 2), and return the state with statistics."""
        self._is_first_in_mode = self._modules.training_flags not in self._known_modes
        self._random.begin()
        self._modules.begin(self._thoroughness)
        self._parameters.begin(probe=self._is_first_in_mode or copy_all, copy_all=copy_all)
        latest = self._combine(self._random.states, self._modules.records, self._parameters.records)
        statistics = self._statistics.read()
        self._before = latest._replace(statistics=statistics) if statistics else latest
        return self._before

    def end_probe(self) -> None:
        """Drop the copies of parameters that `preserved(probe=True)` made, and that no forward changed."""
        self._parameters.end_probe()

    def forget_before(self) -> None:
        """Forget the state before the last outermost block; a new call begins, to which `recover` refers."""
        self._before = None

    def recover(self) -> None:
        """Put back the state before the outermost block of this call, which may have ended, or not, at any line."""
        before, self._before, self._depth = self._before, None, 0
        if before is not None:
            self._random.overwrite(before.random)
            for record in before.modules:
                record.restore(record, hidden=True)
            self._parameters.overwrite(before.parameters)
            write_statistics(before.statistics)

    def _take(self, thoroughness: Thoroughness, *, every_generator: bool) -> Snapshot:
        return self._combine(
            self._random.snapshot(every=every_generator),
            self._modules.snapshot(thoroughness),
            self._parameters.snapshot(),
        )

    def _combine(
        self, random: tuple[Any, ...], modules: tuple[ModuleRecord, ...], parameters: ParameterRecords
    ) -> Snapshot:
        """Return the latest snapshot if it holds these records, else a new one."""
        latest = self._latest
        if latest is None or not (
            random is latest.random and modules is latest.modules and parameters is latest.parameters
        ):
            latest = self._latest = Snapshot(random, modules, parameters)
        return latest

    @property
    def _change_count(self) -> int:
        return self._random.change_count + self._modules.change_count + self._parameters.change_count

    def _restore(self, snapshot: Snapshot, *, every_generator: bool, may_raise: bool = True) -> None:
        self._random.restore(snapshot.random, every=every_generator)
        self._modules.restore(snapshot.modules, self._thoroughness)
        lost = self._parameters.restore(snapshot.parameters)
        write_statistics(snapshot.statistics)
        self._lost = lost
        if may_raise:
            self.refuse_lost_values()

    @property
    def changing_parameters(self) -> list[Tensor]:
        """The parameters that forwards change."""
        return self._parameters.changing

    def refuse_lost_values(self) -> None:
        """Raise a `ReplayError` if the last restoration was not complete (`parameter_values.py`, Rule 4)."""
        if self._lost:
            raise ReplayError(
                f"a forward changed {', '.join(self._lost)}, which no forward changed before, so no copy was made and "
                "the values before are lost; from now on it is copied. Change it before the first training step, too, "
                "or register it as a buffer"
            )


def _are_identical(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))

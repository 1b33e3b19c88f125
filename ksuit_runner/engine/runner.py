"""A whole run: build, restore, train, and close with a true status, whatever happened."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from time import monotonic
from typing import Any

import torch
from rich.console import Console

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.folders import read_tags
from ksuit_runner.checkpoint.format import Checkpoint
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.targets import Trust
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.assembly import Assembly, build_strategy, build_trainer
from ksuit_runner.engine.closing import RefusedError, closing
from ksuit_runner.engine.connect_ranks import connect_ranks
from ksuit_runner.engine.evaluation_only import evaluate_only
from ksuit_runner.engine.initialize import Beginning, initialize
from ksuit_runner.engine.loop import train
from ksuit_runner.engine.meeting import Meeting
from ksuit_runner.engine.never_due import never_due
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.engine.run import Run, save_checkpoint
from ksuit_runner.engine.run_record import RunRecord
from ksuit_runner.engine.silent_record import SilentRecord
from ksuit_runner.engine.stored_start import locked_stored_run, read_checkpoint
from ksuit_runner.errors import (
    ConfigError,
    KsuitError,
    afterwards,
    files_explained,
)
from ksuit_runner.keyed_random import undisturbed
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.record.provenance import Provenance
from ksuit_runner.record.stored_run import Launch, store, store_changes, store_length
from ksuit_runner.recorder.remote import RemoteRecording
from ksuit_runner.recorder.tracker import open_tracker
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.system.signals import catch_signals
from ksuit_runner.tensors.device import current_device, device_name
from ksuit_runner.tensors.kernels import check_deterministic, chosen_kernels
from ksuit_runner.tracker.base import BaseTracker, EndStatus, RunInfo
from ksuit_runner.trainer.sgd import SgdTrainer
from ksuit_runner.ui.acknowledge import acknowledged
from ksuit_runner.ui.command_line import resume_command
from ksuit_runner.ui.logs import setup_logging
from ksuit_runner.ui.terminal import EVALUATED, make_console, print_end, print_start

_LOGGER = logging.getLogger(__name__)
_BEST = "best"  # tag that best_checkpoint gives by default


@dataclass(frozen=True)
class _Given:
    """What a run is asked to do.

    Attributes:
        config: Its config.
        launch: How it was started.
        origin: The stored run that it continues from, if any.
        provenance: Provenance of a new run.
        factory: Factory over the config.
        begun: Called with the id of the run as soon as it has one.
    """

    config: Mapping[str, Any]
    launch: Launch
    origin: Origin | None
    provenance: Provenance
    factory: Factory
    begun: Callable[[str], None] | None


@dataclass(frozen=True)
class _Start:
    """What a run starts with.

    Attributes:
        given: What it is asked to do.
        checkpoint: The checkpoint that it starts from, if any.
        beginning: What its first weights were taken from, if anything.
    """

    given: _Given
    checkpoint: Checkpoint | None
    beginning: Beginning | None


def run(
    config: Mapping[str, Any],
    launch: Launch,
    origin: Origin | None = None,
    console: Console | None = None,
    provenance: Provenance | None = None,
    trust: Trust | None = None,
    begun: Callable[[str], None] | None = None,
) -> RunOutcome:
    """Execute a run, in each of the processes that train it together.

    Args:
        config: Its config as plain values, with everything resolved: what ``check_config`` returns.
        launch: How it was started, to be stored with it.
        origin: The stored run that it starts from, if any.
        console: Where the user reads along.
        provenance: Provenance of a new run; collected by default.
        trust: Which targets a config may name that was not composed here.
        begun: Called with the id of the run as soon as it has one.

    Returns:
        How it ended, with an error in training, which is not raised.

    Raises:
        KsuitError: It could not be started; a ``PeerError`` if another rank could not.
    """
    given = _Given(config, launch, origin, provenance or Provenance(), Factory(config, trust), begun)
    with ExitStack() as stack:
        world = connect_ranks(config)
        stack.callback(world.close)
        stack.enter_context(undisturbed())
        stack.enter_context(_kernels(config))
        meeting = Meeting(world)
        try:
            return _run(given, meeting, console or make_console())
        except BaseException as error:
            if (reported := meeting.settle(error)) is not error and reported is not None:
                raise reported from error
            raise


def _run(given: _Given, meeting: Meeting, console: Console) -> RunOutcome:
    world, config, factory, start_time = meeting.world, given.config, given.factory, monotonic()
    outputs, lock, tracker = OutputPaths(config["output_dir"]), None, None
    with ExitStack() as stack:
        interruption = stack.enter_context(catch_signals())
        with files_explained():
            if world.records:
                lock = stack.enter_context(locked_stored_run(outputs, given.origin))
            checkpoint = read_checkpoint(outputs, given.origin, world)
            if world.records:
                tracker = open_tracker(factory, outputs)
                if tracker.require and tracker.may_be_away:
                    tracker.check_answer()
        strategy = build_strategy(factory, world)
        device = stack.enter_context(_device(config, strategy))
        # The recorder imports the store meanwhile.
        trainer = build_trainer(factory, int(config["seed"]), interruption, strategy)
        _check_device(trainer, device)
        for path in ("callbacks", "default_callbacks"):
            factory.import_all(path, CallbackBase)
        needs_beginning = _needs_beginning(config, given.launch, checkpoint)
        start = _Start(given, checkpoint, initialize(trainer.model, config, world) if needs_beginning else None)
        world.exchange("built")  # what one of them cannot build is not recorded
        with files_explained():
            record = _open_record(given, tracker, outputs, lock, world)
        if given.begun is not None:
            given.begun(record.paths.run_id)
        outcome = RunOutcome(record.paths.run_id, record.paths.run_dir)
        stack.enter_context(setup_logging(record.paths.log, console, world.rank))
        if world.records:
            stack.enter_context(acknowledged(_LOGGER.warning))
        with closing(record, trainer, outcome, meeting):
            _assemble_and_execute(start, Assembly(factory, config, trainer, record, meeting), outcome, console)
        mode = given.launch.mode
        is_as_it_was = outcome.is_refused and mode in (Mode.RESUME, Mode.EVALUATE)
        if world.records and not console.quiet and outcome.folder.is_dir() and not is_as_it_was:
            next_command, best = _next_command(given.launch, record), read_tags(record.paths).get(_BEST)
            print_end(
                *(console, outcome.summary, record.paths.run_dir, next_command, _what_ended(mode, outcome)),
                seconds=monotonic() - start_time,
                best=record.paths.checkpoints_dir / best if best is not None else None,
            )
    return outcome


def _what_ended(mode: Mode, outcome: RunOutcome) -> str:
    """Return how a run has ended; or how its evaluation has, whatever the status is that the run keeps."""
    if mode != Mode.EVALUATE:
        return outcome.status
    return EndStatus.KILLED if outcome.signal else EndStatus.FAILED if outcome.error else EVALUATED


def _needs_beginning(config: Mapping[str, Any], launch: Launch, checkpoint: Checkpoint | None) -> bool:
    """Whether the weights that the run began with are needed: the checkpoint, or one to be written, refers to them."""
    writes_reference = launch.mode != Mode.EVALUATE and config["checkpoint"].get("content") == "trained"
    return checkpoint is None or bool(checkpoint.base) or writes_reference


def _kernels(config: Mapping[str, Any]) -> AbstractContextManager[None]:
    return chosen_kernels(_is_deterministic(config), config["trainer"].get("tf32"))


def _is_deterministic(config: Mapping[str, Any]) -> bool:
    return bool(config["trainer"].get("deterministic", True))


@contextmanager
def _device(config: Mapping[str, Any], strategy: Strategy) -> Iterator[torch.device]:
    """Make the device of the run the current one, before anything is seeded."""
    device = strategy.device(config["trainer"].get("device", "auto"))
    with current_device(device):
        if _is_deterministic(config):
            check_deterministic(device)
        yield device


def _check_device(trainer: SgdTrainer, device: torch.device) -> None:
    """Check that the trainer is on the device whose generator is seeded."""
    if trainer.device != device:
        name = type(trainer).__name__
        raise ConfigError(f"{name} is on {trainer.device}, and not on {device}: name its device", path="trainer.device")


def _open_record(
    given: _Given, tracker: BaseTracker | None, outputs: OutputPaths, lock: RunLock | None, world: World
) -> SilentRecord:
    """Open the record of the run on rank 0, and on the others what stands for it."""
    if tracker is None:
        run = RunInfo(**world.broadcast(None))
        return SilentRecord(PathProvider(outputs.output_dir, run.run_id), run)
    origin, config = given.origin, given.config
    if origin is None or lock is None:
        record = RunRecord.begin(tracker, outputs, config, given.launch, given.provenance, RemoteRecording)
    else:
        paths = PathProvider(outputs.output_dir, origin.run_id)
        is_evaluation, register_anew = origin.mode == Mode.EVALUATE, bool(config.get("register_anew"))
        record = RunRecord.resume(tracker, paths, lock, is_evaluation, register_anew, RemoteRecording)
    world.broadcast(asdict(record.tracker.run))
    return record


def _assemble_and_execute(start: _Start, assembly: Assembly, outcome: RunOutcome, console: Console) -> None:
    record, mode, world = assembly.record, start.given.launch.mode, assembly.meeting.world
    try:
        assembled = _assemble(start, assembly)
        world.exchange("assembled")
    except KsuitError as error:
        raise RefusedError from error
    outcome.summary = assembled.log_writer.summary
    if world.records:
        _print_start(console, record, start, device_name(assembly.trainer.device))
        if mode != Mode.EVALUATE:
            for remark in never_due(assembled.hooks.periodic, assembled.counter, assembly.config):
                _LOGGER.warning(remark)
    try:
        _execute(assembled, start.given, record)
    except ConfigError as error:
        if assembled.has_begun:
            raise
        raise RefusedError from error
    if mode == Mode.EVALUATE:
        outcome.status, outcome.signal = record.status_before, assembled.interruption.signal
    elif assembled.is_finished:
        outcome.status = EndStatus.FINISHED
    else:
        assert assembled.interruption.signal is not None, "training ended early, and nothing says why"
        outcome.status, outcome.signal = EndStatus.KILLED, assembled.interruption.signal


def _assemble(start: _Start, assembly: Assembly) -> Run:
    """Store what the run was started with, and assemble it.

    Raises:
        KsuitError: It cannot be started like this.
    """
    given, checkpoint, record, world = start.given, start.checkpoint, assembly.record, assembly.meeting.world
    mode, data = given.launch.mode, assembly.trainer.data_container
    with files_explained():  # first of all: without its config a killed run cannot be resumed
        if mode in (Mode.TRAIN, Mode.FORK) and world.records:
            store(record.paths, given.config, given.launch, data.known_shapes())
    if mode != Mode.EVALUATE and world.records:
        data.check_repeatable()
    with files_explained():
        if mode != Mode.EVALUATE:
            record.describe(given.config, data, given.provenance, given.launch.choices)
        if start.beginning is not None and checkpoint is None:
            record.link_beginning(start.beginning.source, start.beginning.run_id)
        if mode == Mode.FORK and checkpoint is not None:
            record.carry_history(checkpoint.paths, checkpoint.progress.update)
    world.exchange("described")  # what rank 0 has written is there for all
    assembled = assembly.run(checkpoint, given.origin)
    if mode != Mode.EVALUATE and world.records:
        with files_explained():
            store_length(record.paths, assembled.counter.end_update)
    assembled.when_accepted = partial(_record_start, assembled, given, checkpoint, record)
    return assembled


def _record_start(run: Run, given: _Given, checkpoint: Checkpoint | None, record: SilentRecord) -> None:
    """Store the changes of a resume, and have what describes the run delivered, once its callbacks have added to it.

    What is sent while a short run trains need not be waited for at its end.
    """
    if given.launch.mode == Mode.RESUME and given.origin is not None and given.origin.changes:
        _keep_changes(run, given, checkpoint, record)
    record.notify()


def _keep_changes(run: Run, given: _Given, checkpoint: Checkpoint | None, record: SilentRecord) -> None:
    """Store the changes of a resume, which the next one then need not repeat; those that are refused are forgotten."""
    assert given.origin is not None
    with files_explained():
        if checkpoint is not None and _differs(run, checkpoint):
            save_checkpoint(run, wait=True)  # the next resume sees the changed config, and no changes
        if run.world.records:
            store_changes(record.paths, given.config, given.launch)
            record.annotate(given.config, given.origin.changes)


def _differs(run: Run, checkpoint: Checkpoint) -> bool:
    """Whether a resume with changes has other callbacks than its checkpoint, or continues after an early stop."""
    was_stopped: bool = checkpoint.state["trainer"]["counter"]["stopped"]
    has_same_callbacks = run.hooks.states.names == checkpoint.state["callbacks"].keys()
    return not has_same_callbacks or run.counter.stopped != was_stopped


def _execute(run: Run, given: _Given, record: SilentRecord) -> None:
    mode = given.launch.mode
    with afterwards(run.checkpoint_writer.close, run.hooks.close):
        if mode == Mode.EVALUATE:
            evaluate_only(run, record)
            return
        if mode == Mode.FORK:
            save_checkpoint(run, wait=True)  # so that it can be resumed without its parent
        if run.is_finished:
            _LOGGER.info("nothing is left to do: %s", _why_finished(run.counter, given.config["trainer"]))
            run.when_accepted()
        if not run.is_finished or mode == Mode.FORK:
            train(run)


def _why_finished(counter: UpdateCounter, trainer: Mapping[str, Any]) -> str:
    """Say why a run is at its end, and what makes it longer."""
    if counter.stopped:
        return f"the run was stopped at update {counter.update} by {', '.join(counter.stopped_by)}"
    limits = [f"trainer.{name}" for name in ("max_epochs", "max_updates", "max_samples") if trainer.get(name)]
    longer = f"; a larger {' and '.join(limits)} continues it" if limits else ""
    return f"the run is at its end, update {counter.update}{longer}"


def _next_command(launch: Launch, record: SilentRecord) -> str | None:
    return None if launch.mode == Mode.EVALUATE else resume_command(record.paths.run_id, record.paths.output_dir)


def _print_start(console: Console, record: SilentRecord, start: _Start, device: str) -> None:
    info, paths = record.tracker.run, record.paths
    if not console.quiet:
        print_start(console, info.run_id, info.name, record.tracker.where(), paths.run_dir, device)
    if start.checkpoint is not None:
        _LOGGER.info("starts from checkpoint %s", start.checkpoint.progress)
    if start.beginning is not None and start.checkpoint is None:
        _LOGGER.info(start.beginning.report)

"""Commands of a sweep: start it, resume it, print its leaderboard."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.check.ranks import check_gpus, rank_count
from ksuit_runner.config.check.signature import SignatureReader
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import show_debugging
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.overrides import allow_only, root, value_of
from ksuit_runner.config.targets import Trust, check_values
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.distributed.environment import place
from ksuit_runner.errors import ConfigError, ResumeError, did_you_mean
from ksuit_runner.launchers.base import Launcher
from ksuit_runner.paths import OutputPaths, PathProvider, SweepPaths
from ksuit_runner.recorder.tracker import open_tracker, warm_up
from ksuit_runner.security.reveal import reveal
from ksuit_runner.security.trust import trust_in
from ksuit_runner.start.start_run import import_engine
from ksuit_runner.sweep.build_plan import plan_sweep
from ksuit_runner.sweep.job_runs import find_records
from ksuit_runner.sweep.job_source import JobSource, ListedJobs
from ksuit_runner.sweep.job_status import read_ends
from ksuit_runner.sweep.leaderboard import Leaderboard, make_leaderboard
from ksuit_runner.sweep.leaderboard_tables import print_leaderboard
from ksuit_runner.sweep.plan import Job, SweepPlan, read_jobs, read_plan, store_plan, stored_texts, update_plan
from ksuit_runner.sweep.plan_changes import refuse_changed_yaml, with_changes, with_tracker_overrides
from ksuit_runner.sweep.runner import SweepOutcome, SweepRunner, build_properties
from ksuit_runner.sweep.stored_sweep import find_sweep, newest_sweep, unknown_sweep
from ksuit_runner.sweep.sweep_settings import Method
from ksuit_runner.system.recorder_lock import StoredRunLock
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.system.untrusted_files import check_folder
from ksuit_runner.tracker.base import KIND_TAG, EndStatus
from ksuit_runner.tracker.start_tags import annotations, start_tags
from ksuit_runner.ui.terminal import make_console

_TAKES = ("output_dir", "tracker", "trust", "objective")


def start_sweep(overrides: Sequence[str], command: str) -> SweepOutcome:
    """Run a new sweep and return how it ended.

    Args:
        overrides: Overrides of the command line.
        command: The command line.

    Raises:
        KsuitError: It could not be started; nothing was trained.
    """
    _refuse_ranks()
    planned = plan_sweep(overrides, command, _begin_recorder)
    show_debugging(HydraConfig.get().verbose)
    launcher = _build_launcher(planned.plan.launcher)
    _check_ranks(launcher, planned.config)
    build_properties(planned.config, planned.plan.objective)
    outputs = OutputPaths(planned.config.output_dir)
    outputs.check()
    tracker = RecordedTracker(open_tracker(Factory(planned.config), outputs), outputs)
    _import_for_jobs(launcher, planned.plan)
    # One process, before any job: the first one to open the store creates it.
    tags = {KIND_TAG: "sweep", **start_tags(command), **annotations(planned.plan.base)}
    info = tracker.start_run(planned.plan.name, tags)
    paths = SweepPaths(outputs.output_dir, info.run_id)
    store_plan(paths, planned.plan, planned.jobs)
    with RunLock(paths.lock) as lock:
        runner = SweepRunner(paths, planned.plan, planned.config, tracker, launcher, make_console(), lock)
        return runner.run(*_source(paths, planned.plan, planned.jobs))


def resume_sweep(paths: SweepPaths, overrides: Sequence[str]) -> SweepOutcome:
    """Resume a sweep and return how it ended.

    Args:
        paths: Files of the sweep.
        overrides: Overrides of the command line: output folder, tracker, launcher, and the settings that may change.

    Raises:
        KsuitError: The sweep is alive, its YAML has changed, or an override would change its jobs; nothing is changed.
    """
    _refuse_ranks()
    check_folder(paths.sweep_dir)
    with RunLock(paths.lock) as lock:
        stored = read_plan(paths)
        plan = with_changes(stored, overrides)
        refuse_changed_yaml(paths, plan)
        trust = _trust_in(paths, plan, overrides)
        plan = _with_password(plan, overrides)
        config = _config_of(paths, plan)
        _begin_recorder(config, trust)
        launcher = _build_launcher(plan.launcher, trust)
        _check_ranks(launcher, config)
        source, total = _source(paths, plan)
        if _is_something_left(paths, plan, total):
            _import_for_jobs(launcher, plan)
        tracker = RecordedTracker(open_tracker(Factory(config, trust), paths), paths)
        runner = SweepRunner(paths, plan, config, tracker, launcher, make_console(), lock, trust)
        register_anew = value_of("register_anew", overrides) == "true"

        def resume() -> None:
            if register_anew:
                runner.recording.forget_lost()
            runner.recording.reach()
            tracker.resume_run(paths.sweep_id)
            if register_anew:
                _register_lost_jobs(paths, Factory(config, trust), tracker)
            update_plan(paths, replace(plan, settings=stored.settings))  # overrides are for this resume only

        return runner.run(source, total, resume)


def _begin_recorder(config: DictConfig, trust: Trust | None = None) -> None:
    """Start the recorder, which takes as long as to plan some hundred jobs and to import torch."""
    warm_up(Factory(config, trust), OutputPaths(config.output_dir))


def _import_for_jobs(launcher: Launcher, plan: SweepPlan) -> None:
    """Import torch, while the recorder starts, if the jobs run in this process."""
    if launcher.runs_here and rank_count(plan.base) == 1:
        import_engine()


def _is_something_left(paths: SweepPaths, plan: SweepPlan, total: int) -> bool:
    """Whether a job has not ended, as far as is known here without the tracker."""
    done = {EndStatus.FINISHED} if plan.settings.retry else {EndStatus.FINISHED, EndStatus.FAILED}
    return sum(end.status in done for end in read_ends(paths).values()) < total


def _refuse_ranks() -> None:
    here = place()
    if here is not None and here.size > 1:
        raise ConfigError(
            f"a sweep is started by one process, and {here.starter} has started {here.size}. "
            f"For jobs of so many ranks: ranks={here.size}, without {here.starter}"
        )


def _check_ranks(launcher: Launcher, config: DictConfig) -> None:
    """Check that the jobs have as many ranks as the launcher starts processes for them, and as there are GPUs here."""
    ranks = config.get("ranks", 1)
    if launcher.is_elsewhere and ranks == "auto":
        raise ConfigError("how many GPUs a job will have is not known here: write their number", path="ranks")
    if launcher.tasks not in (1, ranks):
        raise ConfigError(f"a job has {launcher.tasks} tasks, and {ranks} ranks: ranks={launcher.tasks}", path="ranks")
    if not launcher.is_elsewhere:
        check_gpus({str(key): value for key, value in config.items()})


def _register_lost_jobs(paths: SweepPaths, factory: Factory, tracker: RecordedTracker) -> None:
    """Register those runs of the jobs again that the tracker has lost."""
    for record in find_records(paths, tracker).values():
        run = PathProvider(paths.output_dir, record.run_id)
        store = open_tracker(factory, paths)
        with StoredRunLock(run.lock, run.recorder_lock) as lock:
            recording = Recording(store, run, lock.check)
            if recording.forget_lost():
                recording.mark_if_killed()
                recording.deliver_all()


def show_leaderboard(query: str, overrides: Sequence[str]) -> int:
    """Print the leaderboard of a sweep as it stands and return the exit status.

    Args:
        query: The sweep: its id, the first 6 or more characters of it, its name, or ``last``.
        overrides: Overrides of the command line: where it is, and by which ``objective`` to rank it instead of its own.

    Raises:
        ResumeError: There is no such sweep.
        ConfigError: No job has logged the objective, or something else is given.
    """
    allow_only(overrides, "leaderboard", *_TAKES)
    paths = newest_sweep(overrides) if query == "last" else find_sweep(query, overrides, is_surely=True)
    if paths is None:
        raise unknown_sweep(query, overrides)
    print_leaderboard(make_console(), read_leaderboard(paths, overrides)[1])
    return 0


def stored_factory(paths: SweepPaths, overrides: Sequence[str]) -> Factory:
    """Return a factory for the tracker of a stored sweep, with the overrides of the command line applied.

    Raises:
        KsuitError: The plan is damaged or not trusted.
    """
    plan = with_tracker_overrides(read_plan(paths), overrides)
    trust = _trust_in(paths, plan, overrides)
    return Factory(_config_of(paths, _with_password(plan, overrides)), trust)


def read_leaderboard(paths: SweepPaths, overrides: Sequence[str]) -> tuple[SweepPlan, Leaderboard]:
    """Return the plan of a stored sweep, and its leaderboard as it stands.

    Args:
        paths: Files of the sweep.
        overrides: Overrides of the command line; only output folder, tracker, trust and objective matter.

    Raises:
        KsuitError: The plan is damaged or not trusted, the tracker cannot be asked, or no job has logged the objective.
    """
    plan, jobs = with_tracker_overrides(read_plan(paths), overrides), read_jobs(paths)
    trust = _trust_in(paths, plan, overrides)
    plan = _with_password(plan, overrides)
    config = _config_of(paths, plan)
    tracker = RecordedTracker(open_tracker(Factory(config, trust), paths), paths)  # knows runs by their local ids
    source, _ = _source(paths, plan)
    if (objective := value_of("objective", overrides)) is not None:
        unranked = replace(plan, objective=None)
        known = make_leaderboard(paths, unranked, jobs, tracker, build_properties(config, None, trust)).metric_keys
        if objective not in known:
            has_no = "no job has logged this metric, or it has no better direction"
            raise ConfigError(f"{objective}: {has_no}. {did_you_mean(objective, known)}", path="objective")
        plan = replace(plan, objective=objective)
    properties = build_properties(config, plan.objective, trust)
    return plan, make_leaderboard(paths, plan, jobs, tracker, properties, source.pruned())


def _source(paths: SweepPaths, plan: SweepPlan, jobs: list[Job] | None = None) -> tuple[JobSource, int]:
    """Return where the jobs come from (by default the stored ones), and how many there will be."""
    if plan.settings.method is Method.TPE:
        from ksuit_runner.sweep.optuna_search import OptunaSearch

        assert plan.settings.samples is not None
        return OptunaSearch(paths, plan), plan.settings.samples
    jobs = read_jobs(paths, plan.job_count) if jobs is None else jobs
    return ListedJobs(jobs), len(jobs)


def _trust_in(paths: SweepPaths, plan: SweepPlan, overrides: Sequence[str]) -> Trust | None:
    """Return the limits of a stored plan and its jobs, None if this user has made them on this machine.

    Raises:
        KsuitError: They are not the user's, and name what the user does not trust.
    """
    changes = [root(item) for item in overrides if root(item) == "launcher"]
    tracker = plan.with_tracker(plan.base)["tracker"]
    trust = trust_in(paths.signature, stored_texts(paths), paths, tracker, overrides, changes)
    if trust is not None:
        if any("${" in item for item in plan.fixed):
            raise ResumeError(
                f"{paths.plan}: its overrides refer to other config paths, and you did not make it on this machine"
            )
        reader = SignatureReader()
        check_values({"launcher": plan.launcher, "tracker": plan.tracker})
        for config in (plan.base, *(job.config for job in read_jobs(paths))):
            check_values(config)
            check_config(OmegaConf.create(dict(config)), reader, trust)
    return trust


def _with_password(plan: SweepPlan, overrides: Sequence[str]) -> SweepPlan:
    """Return the plan with its tracker's password, which is not stored."""
    node = plan.with_tracker(plan.base)["tracker"]
    revealed = reveal({"tracker": node}, overrides)["tracker"]
    return replace(plan, tracker={**plan.tracker, **{key: revealed[key] for key in node if revealed[key] != node[key]}})


def _config_of(paths: SweepPaths, plan: SweepPlan) -> DictConfig:
    """Return the config that all jobs share, as planned, with the sweep's tracker."""
    config = OmegaConf.create(plan.with_tracker(plan.base))
    config.output_dir = str(paths.output_dir)
    return config


def _build_launcher(node: Mapping[str, Any], trust: Trust | None = None) -> Launcher:
    config = OmegaConf.create({"launcher": dict(node)})
    return Factory(config, trust).build("launcher", Launcher)  # type: ignore[type-abstract]

"""What the command line can ask of a sweep: start one, go on with one, show what one has found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.check.objects import ObjectChecker
from ksuit_runner.config.check.signature import SignatureReader
from ksuit_runner.config.check.whole_config import check_config, resolve
from ksuit_runner.config.compose import compose_config
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.overrides import bare_name, parse, root, value_of
from ksuit_runner.config.targets import Trust, check_values
from ksuit_runner.delivery.catch_up import send_all
from ksuit_runner.delivery.deferred import DeferredTracker
from ksuit_runner.errors import ResumeError
from ksuit_runner.launchers.base import Launcher
from ksuit_runner.paths import OutputPaths, PathProvider, SweepPaths
from ksuit_runner.security.reveal import reveal
from ksuit_runner.security.trust import trust_in
from ksuit_runner.sweep.build_plan import plan_sweep, read_yaml
from ksuit_runner.sweep.find_sweep import find_sweep, unknown_sweep
from ksuit_runner.sweep.job_status import find_records
from ksuit_runner.sweep.leaderboard import make_leaderboard
from ksuit_runner.sweep.plan import Job, Plan, differences, read_jobs, read_plan, store_plan, stored_texts, update_plan
from ksuit_runner.sweep.report import print_leaderboard
from ksuit_runner.sweep.session import JobSource, Listed, Session, SweepOutcome, build_properties
from ksuit_runner.sweep.settings import MAY_CHANGE, read_settings
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.system.untrusted_files import check_folder
from ksuit_runner.tracker.base import KIND_TAG
from ksuit_runner.tracker.build import build_tracker
from ksuit_runner.ui.terminal import make_console

_LOCATORS = ("output_dir", "tracker", "trust")


def start_sweep(overrides: Sequence[str], command: str) -> SweepOutcome:
    """Do a sweep and return how it ended.

    Args:
        overrides: Overrides of the command line.
        command: The command line.

    Raises:
        KsuitError: It could not be started; then nothing was trained.
    """
    planned = plan_sweep(overrides, command)
    launcher = _build_launcher(planned.plan.launcher)
    build_properties(planned.config, planned.plan.objective)
    outputs = OutputPaths(planned.config.output_dir)
    tracker = DeferredTracker(build_tracker(Factory(planned.config), outputs), outputs)
    # One process, before any job: the first one to open the store creates it.
    info = tracker.start_run(planned.plan.name, {KIND_TAG: "sweep", "ksuit.command": command})
    paths = SweepPaths(outputs.output_dir, info.run_id)
    store_plan(paths, planned.plan, planned.jobs)
    with RunLock(paths.lock) as lock:
        session = Session(paths, planned.plan, planned.config, tracker, launcher, make_console(), lock)
        return session.run(*_source(paths, planned.plan, planned.jobs))


def resume_sweep(paths: SweepPaths, overrides: Sequence[str]) -> SweepOutcome:
    """Resume a sweep and return how it ended.

    Args:
        paths: Files of the sweep.
        overrides: Overrides of the command line: where runs are, where they run from now on, and a few settings.

    Raises:
        KsuitError: The sweep is alive, its YAML has changed, or an override would change its jobs; nothing is changed.
    """
    check_folder(paths.sweep_dir)
    with RunLock(paths.lock) as lock:
        stored = read_plan(paths)
        plan = _changed(stored, overrides)
        _refuse_changed_yaml(paths, plan)
        trust = _trust_in(paths, plan, overrides)
        plan = _revealed(plan, overrides)
        config = _config_of(paths, plan)
        tracker = DeferredTracker(build_tracker(Factory(config, trust), paths), paths)
        launcher = _build_launcher(plan.launcher, trust)
        session = Session(paths, plan, config, tracker, launcher, make_console(), lock, trust)
        source, total = _source(paths, plan)
        register_anew = value_of("register_anew", overrides) == "true"

        def resume() -> None:
            if register_anew:
                tracker.forget_lost(paths.sweep_id)
            tracker.resume_run(paths.sweep_id)
            if register_anew:
                _record_lost_jobs(paths, Factory(config, trust), tracker)
            update_plan(paths, replace(plan, settings=stored.settings))  # what was allowed once is not for ever

        return session.run(source, total, resume)


def _record_lost_jobs(paths: SweepPaths, factory: Factory, tracker: DeferredTracker) -> None:
    """Record those runs of the jobs anew that the tracker has lost."""
    for record in find_records(paths, tracker).values():
        run = PathProvider(paths.output_dir, record.run_id)
        job = DeferredTracker(build_tracker(factory, paths), paths)
        with RunLock(run.lock):
            if job.forget_lost(run.run_id):
                job.attach_run(run.run_id)
                send_all(job, run)


def show_leaderboard(query: str, overrides: Sequence[str]) -> int:
    """Print the leaderboard of a sweep as it stands and return the exit status.

    Raises:
        ResumeError: There is no such sweep.
    """
    paths = find_sweep(query, overrides)
    if paths is None:
        raise unknown_sweep(query, overrides)
    plan, jobs = _with_tracker(read_plan(paths), overrides), read_jobs(paths)
    trust = _trust_in(paths, plan, overrides)
    plan = _revealed(plan, overrides)
    config = _config_of(paths, plan)
    tracker = DeferredTracker(build_tracker(Factory(config, trust), paths), paths)  # it knows runs by their ids here
    source, _ = _source(paths, plan)
    properties = build_properties(config, plan.objective, trust)
    board = make_leaderboard(paths, plan, jobs, tracker, properties, source.pruned())
    print_leaderboard(make_console(), board)
    return 0


def _source(paths: SweepPaths, plan: Plan, jobs: list[Job] | None = None) -> tuple[JobSource, int]:
    """Return where the jobs come from, by default those that are stored, and how many there are to be."""
    if plan.settings.method == "tpe":
        from ksuit_runner.sweep.search import Search

        assert plan.settings.samples is not None
        return Search(paths, plan), plan.settings.samples
    jobs = read_jobs(paths, plan.job_count) if jobs is None else jobs
    return Listed(jobs), len(jobs)


def _trust_in(paths: SweepPaths, plan: Plan, overrides: Sequence[str]) -> Trust | None:
    """Return the limits of a stored plan and its jobs, None if this user has made them on this machine.

    Raises:
        KsuitError: They are not the user's, and name what the user does not trust.
    """
    changes = [root(item) for item in overrides if root(item) == "launcher"]
    tracker = plan.with_tracker(plan.base)["tracker"]
    trust = trust_in(paths.signature, stored_texts(paths), paths, tracker, overrides, changes)
    if trust is not None:
        if any("${" in item for item in plan.fixed):
            raise ResumeError(f"{paths.plan}: its overrides refer to other places, and it was not made by you here")
        reader = SignatureReader()
        check_values({"launcher": plan.launcher, "tracker": plan.tracker})
        for config in (plan.base, *(job.config for job in read_jobs(paths))):
            check_values(config)
            check_config(OmegaConf.create(dict(config)), reader, trust)
    return trust


def _revealed(plan: Plan, overrides: Sequence[str]) -> Plan:
    """Return the plan with the password of its tracker, which is not stored."""
    node = plan.with_tracker(plan.base)["tracker"]
    revealed = reveal({"tracker": node}, overrides)["tracker"]
    return replace(plan, tracker={**plan.tracker, **{key: revealed[key] for key in node if revealed[key] != node[key]}})


def _config_of(paths: SweepPaths, plan: Plan) -> DictConfig:
    """Return the config with the sweep's tracker, as it was when it was planned."""
    config = OmegaConf.create(plan.with_tracker(plan.base))
    config.output_dir = str(paths.output_dir)
    return config


def _build_launcher(node: Mapping[str, Any], trust: Trust | None = None) -> Launcher:
    config = OmegaConf.create({"launcher": dict(node)})
    return Factory(config, trust).build("launcher", Launcher)  # type: ignore[type-abstract]


def _changed(plan: Plan, overrides: Sequence[str]) -> Plan:
    """Return the plan with what a resume may say anew."""
    allowed = {*(f"sweep.{name}" for name in MAY_CHANGE), "resume", "register_anew"}
    for item in overrides:
        if root(item) not in (*_LOCATORS, "launcher") and bare_name(item) not in allowed:
            raise ResumeError(
                f"{item}: a sweep goes on with the jobs that were planned. "
                f"What may change: launcher, {', '.join(sorted(allowed - {'resume'}))}"
            )
    settings = asdict(plan.settings)
    for item in overrides:
        if root(item) == "sweep":
            settings[bare_name(item).partition(".")[2]] = parse(item).value()
    node = _launcher_node(plan, [item for item in overrides if root(item) == "launcher"])
    return _with_tracker(replace(plan, settings=read_settings(settings, plan.objective), launcher=node), overrides)


def _with_tracker(plan: Plan, overrides: Sequence[str]) -> Plan:
    said = {bare_name(item): parse(item).value() for item in overrides}
    prefix = "tracker."
    found = {place.removeprefix(prefix): value for place, value in said.items() if place.startswith(prefix)}
    return replace(plan, tracker={**plan.tracker, **found})


def _launcher_node(plan: Plan, overrides: Sequence[str]) -> dict[str, Any]:
    """Return where the jobs run from now on: another launcher, or the same one with other values."""
    if "launcher" in map(bare_name, overrides):
        node = resolve(compose_config(overrides))["launcher"]
    else:
        config = OmegaConf.create({"launcher": plan.launcher})
        for item in overrides:
            OmegaConf.update(config, bare_name(item), parse(item).value())
        node = resolve(config)["launcher"]
    ObjectChecker().walk("launcher", node)
    assert isinstance(node, dict)
    return node


def _refuse_changed_yaml(paths: SweepPaths, plan: Plan) -> None:
    """Notice that the sweep's YAML is no longer what was planned by.

    Raises:
        ResumeError: It has changed, and nobody said to keep to the plan.
    """
    if plan.yaml is None or plan.settings.on_change == "keep":
        return
    choice = next(item.partition("=")[2] for item in plan.fixed if item.startswith("sweep="))
    now = read_yaml(choice)
    lines = ["its file is gone"] if now is None else differences(_relevant(plan.yaml), _relevant(now))
    if lines:
        raise ResumeError(
            f"sweep={choice}: the YAML has changed since this sweep was planned: {'; '.join(lines[:3])}\n"
            f"To go on as it was planned: resume={paths.sweep_id[:8]} sweep.on_change=keep\n"
            f"To do what the YAML says now, as a sweep of its own: sweep={choice}"
        )


def _relevant(yaml: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a resume may change."""
    node = yaml.get("sweep") or {}
    kept = {key: value for key, value in node.items() if key not in MAY_CHANGE}
    return {key: value for key, value in yaml.items() if key != "launcher"} | {"sweep": kept}

"""Build the plan of a sweep from a command line: what varies, what is fixed, and every job checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ksuit_runner.config.check.initialization import NODE, initialization_of
from ksuit_runner.config.check.objects import ObjectChecker
from ksuit_runner.config.check.whole_config import resolve
from ksuit_runner.config.compose import NOT_STORED, SWEEP_NODES, compose_config
from ksuit_runner.config.groups import project_conf, shipped_conf
from ksuit_runner.config.overrides import bare_name, full_name, parse, root, to_text, value_of, value_text
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.resume.starting_point import with_starting_point
from ksuit_runner.sweep.job_config import JobComposer, as_job, overrides_of
from ksuit_runner.sweep.parameters import SEED, Combination, SweepParameter, draw, grid, read_parameters
from ksuit_runner.sweep.plan import Job, SweepPlan
from ksuit_runner.sweep.sweep_settings import Method, SweepSettings, read_settings

_SHARED = frozenset({"output_dir", "parent_run_id"})
"""Keys that all jobs have in common."""


@dataclass(frozen=True)
class PlannedSweep:
    """A plan that has not been stored yet.

    Attributes:
        plan: The plan.
        jobs: Its jobs; none for a search, which suggests them one by one.
        parameters: What varies.
        config: The config that all jobs have in common, resolved.
    """

    plan: SweepPlan
    jobs: list[Job]
    parameters: list[SweepParameter]
    config: DictConfig


def plan_sweep(
    overrides: Sequence[str], command: str, on_first_job: Callable[[DictConfig], None] = lambda config: None
) -> PlannedSweep:
    """Plan a sweep and check every combination; nothing is created.

    Args:
        overrides: Overrides of the command line; those with several values vary, like the YAML's ``sweep.params``.
        command: The command line.
        on_first_job: Called with the config that all jobs have in common, once the first one of them is checked.

    Raises:
        ConfigError: A combination does not compose or fails the check, or nothing varies.
    """
    swept = [item for item in overrides if root(item) not in SWEEP_NODES and parse(item).is_sweep_override()]
    fixed = [item for item in overrides if item not in swept]
    values = _resolve_base(compose_config([*fixed, *as_job(0)]))
    settings = read_settings(values["sweep"], values["objective"])
    ObjectChecker().walk("launcher", values["launcher"])
    settings = replace(settings, params=_params(settings, swept, fixed))
    parameters = read_parameters(settings.params, settings.seed)
    fixed = _with_starting_point([item for item in fixed if not _is_about_the_sweep(item)], values, settings.params)
    base = {key: value for key, value in values.items() if key not in NOT_STORED}
    config = OmegaConf.create(base)
    composer, jobs = JobComposer(fixed, swept), list[Job]()
    for index, combination in enumerate(_combinations(settings, parameters)):
        jobs.append(composer.job(combination, index))
        if not index:
            on_first_job(config)
    jobs = jobs if settings.method is not Method.TPE else []
    _check_objective(values["objective"], jobs)
    choice = value_of("sweep", fixed)
    plan = SweepPlan(
        name=values["name"] or choice or "sweep",
        command=command,
        fixed=fixed,
        settings=settings,
        launcher=values["launcher"],
        base=base,
        objective=values["objective"],
        yaml=read_yaml(choice),
        job_count=None if settings.method is Method.TPE else len(jobs),
    )
    return PlannedSweep(plan, jobs, parameters, config)


def _with_starting_point(fixed: list[str], values: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """Fix what all jobs take their weights from: for a later job, the last run would be an earlier one."""
    if any(root(str(key)) == NODE for key in params) or initialization_of(values) is None:
        return fixed
    node = with_starting_point(values)[NODE]
    others = [item for item in fixed if bare_name(item) not in (f"{NODE}.from", f"{NODE}.checksum")]
    return [*others, *(f"{NODE}.{key}={to_text(node[key])}" for key in ("from", "checksum"))]


def read_yaml(choice: str | None) -> dict[str, Any] | None:
    """Return the content of a sweep's YAML file, None if there is none."""
    for folder in (project_conf(), shipped_conf()):
        path = folder / "sweep" / f"{choice}.yaml" if folder is not None else None
        if path is not None and path.is_file():
            content = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(content, dict)
            return {str(key): value for key, value in content.items()}
    return None


def _resolve_base(config: DictConfig) -> dict[str, Any]:
    """Return the config resolved, except for the lists in ``sweep.params``: each job resolves its own value."""
    params = OmegaConf.select(config, "sweep.params")
    raw = OmegaConf.to_container(params) if isinstance(params, DictConfig) else None
    lists = {key: value for key, value in raw.items() if isinstance(value, list)} if isinstance(raw, dict) else {}
    with open_dict(config):
        for key in lists:
            params[key] = None
    values = resolve(config)
    if lists:
        values["sweep"]["params"] |= lists
    return values


def _is_about_the_sweep(override: str) -> bool:
    return root(override) in SWEEP_NODES and full_name(override) != "sweep"


def _params(settings: SweepSettings, swept: Sequence[str], fixed: Sequence[str]) -> dict[str, Any]:
    """Return what varies: the parameters of the command line, and those of the YAML that it does not override."""
    given = {bare_name(item) for item in [*swept, *fixed]}
    params = {key: value for key, value in settings.params.items() if bare_name(str(key)) not in given}
    params |= {full_name(item): value_text(item) for item in swept}
    # One run on a launcher is a sweep with one job.
    is_launched = settings.method is Method.GRID and any(bare_name(item) == "launcher" for item in fixed)
    if not params and not is_launched:
        raise ConfigError(
            "nothing varies. Give several values: -m optimizer.lr=1e-2,1e-3 seed=0,1", path="sweep.params"
        )
    known = {bare_name(str(key)) for key in params}
    for key in known & _SHARED:
        raise ConfigError("it is the same for all jobs of a sweep", path=key)
    for key in settings.mean_over:
        if settings.method is Method.TPE and key in known:
            raise ConfigError(
                f"an Optuna search has one {key}; run its best jobs in a sweep over it", path=f"sweep.params.{key}"
            )
        if key not in {SEED, *given, *known}:
            raise ConfigError(f"the sweep does not vary '{key}'. {did_you_mean(key, known)}", path="sweep.mean_over")
    return params


def _combinations(settings: SweepSettings, parameters: Sequence[SweepParameter]) -> Iterable[Combination]:
    """Return the combinations to check: those of the jobs, for a search the extreme ones that it can suggest."""
    if settings.method is Method.TPE:
        return _extremes(parameters)
    if settings.method is Method.RANDOM:
        assert settings.samples is not None
        return draw(parameters, settings.samples, settings.seed, settings.mean_over)
    return grid(parameters)


def _extremes(parameters: Sequence[SweepParameter]) -> Iterator[Combination]:
    """Yield combinations with the extreme values that a search can suggest, one parameter after the other."""
    first = {item.key: item.extremes()[0] for item in parameters}
    for parameter in parameters:
        for value in parameter.extremes():
            yield first | {parameter.key: value}


def _check_objective(objective: str | None, jobs: Sequence[Job]) -> None:
    """Check that all jobs have the objective of the sweep; that each logs its own was checked with its config."""
    for job in jobs:
        if objective is not None and (own := job.config["objective"]) != objective:
            raise ConfigError(
                f"a job could not be ranked by '{objective}': its objective is '{own}'\n"
                f"This is the job {' '.join(overrides_of(job.combination))}",
                path="objective",
            )

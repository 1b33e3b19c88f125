"""What a resume may change in a sweep's plan, and what it refuses."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from omegaconf import OmegaConf

from ksuit_runner.config.check.objects import ObjectChecker
from ksuit_runner.config.check.whole_config import resolve
from ksuit_runner.config.compose import compose_config
from ksuit_runner.config.differences import ABSENT, differences
from ksuit_runner.config.overrides import bare_name, parse, root, value_of
from ksuit_runner.errors import ResumeError
from ksuit_runner.paths import SweepPaths
from ksuit_runner.sweep.build_plan import read_yaml
from ksuit_runner.sweep.plan import SweepPlan
from ksuit_runner.sweep.sweep_settings import MAY_CHANGE, OnChange, read_settings

_LOCATORS = ("output_dir", "tracker", "trust")


def with_changes(plan: SweepPlan, overrides: Sequence[str]) -> SweepPlan:
    """Return the plan with the settings, launcher and tracker that a resume gives.

    Raises:
        ResumeError: An override would change the jobs.
    """
    allowed = {*(f"sweep.{name}" for name in MAY_CHANGE), "resume", "register_anew"}
    for item in overrides:
        if root(item) not in (*_LOCATORS, "launcher") and bare_name(item) not in allowed:
            raise ResumeError(
                f"{item}: a sweep is resumed with the jobs that were planned. "
                f"What can change: launcher, {', '.join(sorted(allowed - {'resume'}))}"
            )
    settings = asdict(plan.settings)
    for item in overrides:
        if root(item) == "sweep":
            settings[bare_name(item).partition(".")[2]] = parse(item).value()
    node = _launcher_node(plan, [item for item in overrides if root(item) == "launcher"])
    return with_tracker_overrides(
        replace(plan, settings=read_settings(settings, plan.objective), launcher=node), overrides
    )


def with_tracker_overrides(plan: SweepPlan, overrides: Sequence[str]) -> SweepPlan:
    """Return the plan with the overrides of ``tracker``."""
    changed = OmegaConf.create({"tracker": plan.tracker})
    for item in overrides:
        if bare_name(item).startswith("tracker."):
            OmegaConf.update(changed, bare_name(item), parse(item).value())
    found = OmegaConf.to_container(changed)
    assert isinstance(found, dict)
    return replace(plan, tracker=found["tracker"])


def _launcher_node(plan: SweepPlan, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config of the launcher from now on: another one, or the same with other values."""
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


def refuse_changed_yaml(paths: SweepPaths, plan: SweepPlan) -> None:
    """Refuse a resume after the sweep's YAML has changed, unless the user asks to keep the plan.

    Raises:
        ResumeError: It has changed; says where.
    """
    if plan.yaml is None or plan.settings.on_change is OnChange.KEEP:
        return
    choice = value_of("sweep", plan.fixed)
    now = read_yaml(choice)
    if now is None:
        lines = ["its file is gone"]
    else:
        found = differences(_relevant(plan.yaml), _relevant(now))
        lines = [f"{path}: was {_shown(old)}, is {_shown(new)}" for path, old, new in found]
    if lines:
        raise ResumeError(
            f"sweep={choice}: the YAML has changed since this sweep was planned: {'; '.join(lines[:3])}\n"
            f"To resume it as planned: resume={paths.sweep_id[:8]} sweep.on_change=keep\n"
            f"To run what the YAML says now, as a new sweep: sweep={choice}"
        )


def _relevant(yaml: dict[str, Any]) -> dict[str, Any]:
    """Return a sweep's YAML without what a resume may change."""
    node = yaml.get("sweep") or {}
    kept = {key: value for key, value in node.items() if key not in MAY_CHANGE}
    return {key: value for key, value in yaml.items() if key != "launcher"} | {"sweep": kept}


def _shown(value: Any) -> str:
    return "not there" if value is ABSENT else str(value)

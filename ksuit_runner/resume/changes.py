"""The config of a stored run with the changes that are allowed, before torch is imported."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.check.known_keys import check_keys
from ksuit_runner.config.check.whole_config import resolve
from ksuit_runner.config.compose import without_sweep
from ksuit_runner.config.differences import ABSENT, Difference, differences
from ksuit_runner.config.overrides import bare_name, shell_word, value_text
from ksuit_runner.config.schema import LATER_DEFAULTS, objects_beside
from ksuit_runner.config.targets import Trust
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.distributed.environment import place
from ksuit_runner.errors import ConfigError, ResumeError, TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.mode import OF_STORED_RUNS, Mode
from ksuit_runner.record.stored_run import read_config_and_text, read_launch
from ksuit_runner.resume.recompose import with_overrides
from ksuit_runner.resume.request import refuse_sweep_settings
from ksuit_runner.security.masking import mask_value
from ksuit_runner.security.reveal import reveal
from ksuit_runner.security.trust import trust_in
from ksuit_runner.tensors.name_patterns import matches_any
from ksuit_runner.tracker.start_tags import told
from ksuit_runner.ui.command_line import program

# What may change while a run stays the same run: its length, what is watched and recorded, how data is fetched, and by
# how many processes it is trained.
MAY_CHANGE = (
    "trainer.max_*",
    "trainer.nan_loss",
    "trainer.activation_checkpointing",  # the result is the same
    "callbacks*",
    "default_callbacks*",
    "checkpoint*",
    *("tracker.uri", "tracker.experiment", "tracker.timeout_s", "tracker.require", "tracker.close_timeout_s"),
    "tracker.artifact_root",
    "tracker.*.*",  # those beside the first, which may also come and go
    *("data.num_workers", "data.prefetch", "data.eval_batch_size"),
    "metric_property_provider*",
    *("output_dir", "name", "objective", "resume_strict", "parent_run_id"),
    *("register_anew", "evaluation*", "notes", "tags*"),
    *(
        "strategy*",
        "ranks",
        "rank_timeout_s",
        "max_restarts",
        "requeue",
    ),  # who computes the parts, which stay as they are
)


@dataclass(frozen=True)
class Composed:
    """The config of a run that continues a stored one.

    Attributes:
        config: The stored config with the changes applied.
        changes: Config paths that changed.
        overrides: All overrides that make it, the stored ones and the new ones.
        chosen: What was chosen of groups, then and now, among other overrides.
        trust: What the config may name; None for no limits, if this user has made it on this machine.
    """

    config: DictConfig
    changes: list[str]
    overrides: list[str]
    chosen: dict[str, str]
    trust: Trust | None


def compose_stored(mode: Mode, paths: PathProvider, overrides: Sequence[str]) -> Composed:
    """Return the config of a stored run with the given overrides applied.

    Raises:
        ResumeError: With ``resume``, a change would rewrite the run's past.
        ConfigError: An override names something that does not exist, or has no effect.
    """
    stored, text = read_config_and_text(paths)
    stored = without_sweep(stored)
    stored.update({key: value for key, value in LATER_DEFAULTS.items() if key not in stored})
    stored.update(_last_told(paths))
    extra = [item for item in overrides if bare_name(item) not in (*OF_STORED_RUNS, "trust")]
    refuse_sweep_settings(extra)
    if place() is not None:
        stored.ranks = 1  # how many there are now is not a question of the config
    before = resolve(stored)
    changed = with_overrides(stored, extra)
    check_keys(changed, extra, is_stored=True)
    config = OmegaConf.create(resolve(changed))
    if mode != Mode.FORK and OmegaConf.select(config, "trainer.accumulation_steps") == "auto":
        config.trainer.accumulation_steps = before["trainer"]["accumulation_steps"]  # which is what auto was
    found = list(differences(before, resolve(config)))
    _refuse_without_effect(found, mode)
    if mode == Mode.RESUME:
        _refuse_rewriting(found, paths.run_id, extra, is_compiled=bool((config.get("trainer") or {}).get("compile")))
    changes = [difference.path for difference in found]
    trust = trust_in(paths.signature, [text], paths, config.get("tracker") or {}, overrides, changes)
    values = resolve(config)
    if (revealed := reveal(values, overrides)) is not values:
        config = OmegaConf.create(dict(revealed))
    launch = read_launch(paths)
    chosen = {**launch.choices, **{bare_name(item): value_text(item) for item in extra}}
    return Composed(config, changes, [*launch.overrides, *extra], chosen, trust)


def _last_told(paths: PathProvider) -> dict[str, Any]:
    """Return the notes and tags of a run that ``annotate`` may have changed; without an intact outbox none."""
    with suppress(TrackerError):
        if box := Outbox.load(paths):
            return told(box.all_tags)
    return {}


def _refuse_without_effect(changes: Sequence[Difference], mode: Mode) -> None:
    """Refuse another dataset for evaluations if none takes it: a stored config has values in place of references.

    And notes and tags for what only evaluates.
    """
    has_effect = any(item.path.startswith(("callbacks", "data.")) for item in changes)
    for path, _, dataset in changes:
        if mode == Mode.EVALUATE and path in ("notes", "tags"):
            raise ConfigError("an evaluation does not change it; annotate=RUN does", path=path)
        if path == "evaluation.dataset" and not has_effect:
            raise ConfigError(
                "it would have no effect: the callbacks of a stored run name their datasets. Choose them anew as well, "
                f"such as 'callbacks=[accuracy,loss]', or write callbacks.accuracy.dataset_key={dataset}",
                path=path,
            )


def _refuse_rewriting(changes: Sequence[Difference], run_id: str, extra: Sequence[str], is_compiled: bool) -> None:
    # A password that is given again is not a change.
    new = [item for item in changes if mask_value(item.path, item.new) != item.old]
    # Compiled code that computes activations again draws other random numbers.
    fixed = "trainer.activation_checkpointing" if is_compiled else None
    refused = [item for item in new if item.path == fixed or not _may_change(item)]
    if not refused:
        return
    lines = [f"  {path}: {_short(old)} -> {_short(new)}" for path, old, new in refused]
    if len(lines) > _LISTED:
        lines = [*lines[: _LISTED - 1], f"  and {len(lines) - _LISTED + 1} more"]
    fork = " ".join([program(), *(shell_word(item) for item in (f"fork={run_id}", *extra))])
    raise ResumeError("\n".join([f"this would rewrite the past of run {run_id[:8]}:", *lines, f"As a new run: {fork}"]))


_LISTED = 4


def _may_change(item: Difference) -> bool:
    if item.path == "initialize.from":  # the checksum decides; the file may lie elsewhere
        return item.old is not None
    if item.path == "trainer.device":  # another one of the same kind
        kinds = {str(value).partition(":")[0] for value in (item.old, item.new) if value is not ABSENT}
        return len(kinds - {"auto"}) < 2
    if item.path in ("strategy", "strategy.sync_batchnorm"):  # with it the result depends on the ranks
        return _syncs(item.old) is _syncs(item.new)
    above, _, name = item.path.rpartition(".")
    comes_or_goes = above == "tracker" and any(objects_beside(above, {name: value}) for value in (item.old, item.new))
    return comes_or_goes or matches_any(item.path, MAY_CHANGE)


def _syncs(value: Any) -> bool:
    """Whether a strategy, or its ``sync_batchnorm``, asks for statistics of all ranks."""
    return value is not ABSENT and bool(value.get("sync_batchnorm") if isinstance(value, Mapping) else value)


def _short(value: Any) -> str:
    text = "none" if value is ABSENT else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

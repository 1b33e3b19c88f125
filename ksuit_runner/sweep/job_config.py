"""The config of each job: composed and checked before the first one starts."""

import json
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.check.known_keys import KnownKeys, check_keys
from ksuit_runner.config.check.signature import SignatureReader
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.comparable import named_choices
from ksuit_runner.config.compose import ASKS_HYDRA, Template, compose_config, compose_with_choices, without_sweep
from ksuit_runner.config.differences import is_same
from ksuit_runner.config.groups import groups
from ksuit_runner.config.overrides import bare_name, full_name
from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.resume.starting_point import with_starting_point
from ksuit_runner.sweep.parameters import Combination
from ksuit_runner.sweep.plan import Job


def overrides_of(combination: Combination) -> list[str]:
    """Return a combination as overrides."""
    return [f"{key}={value}" for key, value in combination.items()]


def as_job(number: int) -> list[str]:
    """Return the overrides that set the number of the job for Hydra."""
    return [f"hydra.job.num={number}", f"hydra.job.id={number}"]


class JobComposer:
    """Composes and checks the configs of a sweep's jobs.

    Hydra composes once for every choice of groups; plain values are then set as Hydra sets them. The folders of YAML
    files are as they were when it was made. So a job takes about 5 ms instead of 200.

    Args:
        fixed: The overrides that all jobs have.
        written: What varies, as overrides with all its values, for messages that are about all jobs.
    """

    def __init__(self, fixed: Sequence[str], written: Sequence[str] = ()) -> None:
        self._fixed = list(fixed)
        self._written = {full_name(item): item for item in written}
        self._groups = set(groups())
        self._known, self._reader = KnownKeys(), SignatureReader()
        self._composed: dict[tuple[str, ...], tuple[Template | None, dict[str, str]]] = {}

    def job(self, combination: Combination, number: int = 0) -> Job:
        """Return a job with its resolved config.

        Args:
            combination: What varies -> the value that this job has.
            number: Its number, also the value of ``${hydra:job.num}``.

        Raises:
            ConfigError: It does not compose or fails the check; names the combination.
        """
        try:
            config, choices = self._apply(combination, number)
            check_keys(config, [*self._fixed, *overrides_of(combination)], known=self._known)
            values = with_starting_point(check_config(without_sweep(config), self._reader))
            return Job(number, combination, _json_values(dict(values)), choices)
        except KsuitError as error:
            raise self._explained(error, combination) from error

    def _explained(self, error: KsuitError, combination: Combination) -> ConfigError:
        """Say which job has failed, unless it has a key that no job has: then the message has that as it is written."""
        first, *others = str(error).splitlines()
        for item, key in zip(overrides_of(combination), combination, strict=True):
            if first.startswith(f"{item}: ") and " has no '" in first:
                first, *others = (line.replace(item, self._written.get(key, key)) for line in (first, *others))
                if not any(map(self._is_structural, combination)):
                    return ConfigError("\n".join([first, *others]))
        return ConfigError("\n".join([first, *others, f"This is the job {' '.join(overrides_of(combination))}"]))

    def _apply(self, combination: Combination, number: int) -> tuple[DictConfig, dict[str, str]]:
        chosen = {key: value for key, value in combination.items() if self._is_structural(key)}
        structure = tuple(overrides_of(chosen))
        if structure not in self._composed:
            composed, chosen = compose_with_choices([*self._fixed, *structure, *as_job(0)])
            asks_hydra = ASKS_HYDRA.search(str(OmegaConf.to_container(composed)))
            template = None if asks_hydra else Template(composed)
            self._composed[structure] = template, named_choices(composed, chosen)
        every = overrides_of(combination)
        values = [item for item in every if item not in structure]
        template, choices = self._composed[structure]
        config = None if template is None or ASKS_HYDRA.search(str(values)) else template.with_values(values)
        if config is None:
            config = compose_config([*self._fixed, *every, *as_job(number)])
        return config, {} if "_target_" in str(values) else choices

    def _is_structural(self, key: str) -> bool:
        return full_name(key) != bare_name(key) or bare_name(key) in self._groups


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    if not is_same(json.loads(json.dumps(values)), values):
        raise ConfigError(
            "the config of a sweep's job is stored as JSON: keys have to be text, and values not tuples or bytes"
        )
    return values

"""A stored run may be continued by another number of ranks, also one from before there were any; its parts stay."""

import pytest

from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config, without_sweep
from ksuit_runner.config.schema import LATER_DEFAULTS
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.stored_run import Launch, store
from ksuit_runner.resume.changes import compose_stored

DDP = "ksuit_runner.distributed.ddp.DataParallel"


@pytest.fixture(params=["old", "new"])
def stored(request, tmp_path):
    """A stored run of four parts; an old one knows neither ranks nor strategies."""
    config = check_config(without_sweep(compose_config(["trainer.accumulation_steps=4", f"output_dir={tmp_path}"])))
    if request.param == "old":
        config = {key: value for key, value in config.items() if key not in (*LATER_DEFAULTS, "strategy")}
    paths = PathProvider(tmp_path, "run00000")
    store(paths, config, Launch("", []))
    return paths


@pytest.mark.parametrize("overrides", [["ranks=2", "strategy=ddp"], ["ranks=4", "trainer=ddp", "max_restarts=0"]])
def test_ranks_and_strategy_may_change(stored, overrides):
    config = check_config(compose_stored(Mode.RESUME, stored, overrides).config)
    assert config["strategy"]["_target_"] == DDP
    assert config["trainer"]["accumulation_steps"] == 4
    assert compose_stored(Mode.RESUME, stored, []).changes == []


def test_parts_may_change_in_a_fork_only(stored):
    with pytest.raises(ResumeError, match=r"trainer.accumulation_steps: 4 -> 2"):
        compose_stored(Mode.RESUME, stored, ["trainer.accumulation_steps=2"])
    forked = compose_stored(Mode.FORK, stored, ["ranks=2", "strategy=ddp", "trainer.accumulation_steps=auto"])
    assert check_config(forked.config)["trainer"]["accumulation_steps"] == 2


def test_ranks_that_do_not_fit_are_refused(stored, monkeypatch):
    with pytest.raises(ConfigError, match="add trainer=ddp"):
        check_config(compose_stored(Mode.RESUME, stored, ["ranks=2", "strategy=single"]).config)
    with pytest.raises(ConfigError, match="there can be 1, 2, 4 ranks"):
        check_config(compose_stored(Mode.RESUME, stored, ["ranks=3", "strategy=ddp"]).config)
    store(stored, check_config(compose_stored(Mode.RESUME, stored, ["ranks=4", "strategy=ddp"]).config), Launch("", []))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert compose_stored(Mode.RESUME, stored, []).config.ranks == 1  # torchrun has started two
    with pytest.raises(ConfigError, match="ranks: 4 ranks are asked for, and WORLD_SIZE has started 2"):
        check_config(compose_stored(Mode.RESUME, stored, ["ranks=4"]).config)

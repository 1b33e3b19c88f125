"""How many ranks there are, and what is refused before torch is imported."""

import re

import pytest
from omegaconf import OmegaConf

from ksuit_runner.config.check.ranks import check_gpus, rank_count, with_parts
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import SweepPaths
from ksuit_runner.sweep.commands import resume_sweep, start_sweep

DDP = {"_target_": "ksuit_runner.distributed.ddp.DataParallel"}
SINGLE = {"_target_": "ksuit_runner.distributed.strategy.Strategy"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Start without ranks and GPUs of the machine that runs the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "KSUIT_STARTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def torchrun(monkeypatch, size, local_size):
    for name, value in {"RANK": 1, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")


def config(ranks, parts="auto", device="auto", batch_size=16, strategy=DDP):
    trainer = {"accumulation_steps": parts, "device": device}
    return {"ranks": ranks, "strategy": strategy, "trainer": trainer, "data": {"batch_size": batch_size}}


def parts_of(values):
    return with_parts(values)["trainer"]["accumulation_steps"]


def test_the_parts_of_a_batch_are_a_number_before_they_are_stored(monkeypatch):
    assert check_config(compose_config([]))["trainer"]["accumulation_steps"] == 1
    assert parts_of(config(4)) == 4
    assert parts_of(config(2, parts=6)) == 6
    assert parts_of({"trainer": {"accumulation_steps": "auto"}}) == 1  # stored before there were ranks
    torchrun(monkeypatch, 4, 2)
    assert parts_of(config(1)) == parts_of(config(4)) == 4


def test_auto_is_a_rank_for_each_gpu(monkeypatch):
    assert rank_count({"ranks": "auto"}) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 3,5,-1,7")
    assert rank_count({"ranks": "auto"}) == 3
    assert parts_of(config("auto")) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config(2, strategy=SINGLE), "strategy: single is for one process, and there are 2 ranks: add trainer=ddp"),
        (config(2, strategy=None), "strategy: single is for one process"),
        (
            config(4, parts=6),
            "accumulation_steps: 6 parts of a batch .* 4 ranks: .* there can be 1, 2, 3, 6 ranks",
        ),
        (
            config(2, parts=1),
            "accumulation_steps: 1 part of a batch cannot .* 2, or auto. With 1 part there can be 1 rank$",
        ),
        (config(2, batch_size=1), "trainer.accumulation_steps: a batch of 1 sample cannot be divided into 2 parts"),
        (config(4, batch_size=3), "trainer.accumulation_steps: a batch of 3 samples cannot be divided into 4 parts"),
        (
            config(2, device="cuda:1"),
            "trainer.device: 2 ranks need a device each, and cuda:1 .* trainer.device=cuda ",
        ),
    ],
)
def test_what_ranks_cannot_train_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        with_parts(values)


def test_ranks_of_a_machine_have_a_gpu_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert parts_of(config(4)) == 4  # they may be started elsewhere
    with pytest.raises(ConfigError, match="ranks: 4 ranks on this machine need a GPU each, and there are 2"):
        check_gpus(config(4))
    check_gpus(config(2))
    check_gpus(config(4, device="cpu"))
    torchrun(monkeypatch, 4, 2)  # on two machines
    check_gpus(config(1))
    torchrun(monkeypatch, 4, 4)
    with pytest.raises(ConfigError, match="ranks: 4 ranks on this machine need a GPU each, and there are 2"):
        check_gpus(config(1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # which a scheduler may say to each of them
    check_gpus(config(1))
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="need a GPU each, and there are 1"):
        check_gpus(config(4))


def test_ranks_do_not_contradict_torchrun(monkeypatch):
    torchrun(monkeypatch, 4, 4)
    with pytest.raises(ConfigError, match="ranks: 2 ranks are asked for, and torchrun has started 4"):
        rank_count({"ranks": 2})
    with pytest.raises(ConfigError, match="add trainer=ddp"):
        with_parts(config(1, strategy=SINGLE))


def test_a_sweep_is_started_by_one_process_that_knows_its_jobs(monkeypatch):
    with pytest.raises(ConfigError, match="ranks: how many GPUs a job will have is not known here"):
        start_sweep(["seed=0,1", "ranks=auto", "launcher=ray", "launcher.address=auto", "tracker=noop"], "")
    submitit = ["launcher=submitit", "launcher.executor=local", "+launcher.parameters={nodes: 2, tasks_per_node: 4}"]
    ray = ["launcher=ray", "launcher.nodes=2", "launcher.tasks_per_node=4"]
    for tasks in (submitit, ray):
        with pytest.raises(ConfigError, match="ranks: a job has 8 tasks, and 2 ranks: ranks=8"):
            start_sweep(["seed=0,1", "ranks=2", "strategy=ddp", "tracker=noop", *tasks], "")
    with pytest.raises(ConfigError, match="trainer=ddp\nThis is the job ranks=2"):
        start_sweep(["ranks=1,2", "tracker=noop"], "")
    torchrun(monkeypatch, 4, 4)
    for start in (lambda: start_sweep(["seed=0,1"], ""), lambda: resume_sweep(SweepPaths("nowhere", "id"), [])):
        with pytest.raises(ConfigError, match="a sweep is started by one process, and torchrun .* 4.*: ranks=4"):
            start()


@pytest.mark.parametrize(("text", "got"), [("two", "'two'"), ("2.5", "2.5"), ("true", "true")])
def test_ranks_are_a_number_or_auto(text, got):
    with pytest.raises(
        ConfigError, match=re.escape(f"ranks: expects a whole number of at least 1, or 'auto', got {got}")
    ):
        check_config(OmegaConf.merge(compose_config([]), {"ranks": OmegaConf.create(f"x: {text}").x}))

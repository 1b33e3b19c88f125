"""Every YAML that ships composes, passes the check and builds; one that is added later is tested too."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from callbacks.ema import Ema
from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.groups import choices, groups, shipped_conf
from ksuit_runner.distributed.fsdp import has_fsdp
from ksuit_runner.engine.assembly import Assembly, build_trainer
from ksuit_runner.engine.loop import do_update, evaluate, train
from ksuit_runner.engine.run_record import RunRecord
from ksuit_runner.errors import ConfigError
from ksuit_runner.launchers.base import Launcher
from ksuit_runner.models.linear import Linear
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.provenance import Provenance
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.sweep.parameters import read_parameters
from ksuit_runner.system.signals import Interruption
from ksuit_runner.tracker.base import BaseTracker, EndStatus
from ksuit_runner.tracker.build import build_tracker

CONF = shipped_conf()
FILES = [(group, choice) for group in groups() for choice in choices(group)]
# What a choice of these groups fits to is up to the choice; the tests below build them together with what they fit to.
PARTS = ("model", "loss")
# What these callbacks miss here, and say so at once.
MISSING = {"notify": "KSUIT_NOTIFY_URLS|not installed", "stop_at": "one of epoch, update, sample, max_time"}
if not torch.cuda.is_available():
    MISSING["memory_snapshot"] = "CUDA devices"
if not has_fsdp():
    MISSING["fsdp"] = "torch .* is too old for it"
# What these callbacks need of the rest of the config.
NEEDED = {"dead_units": "model=cnn", "gradient_noise_scale": "trainer.accumulation_steps=2"}


@pytest.fixture(autouse=True)
def one_thread():
    """Leave the other cores to the tests beside these: threads that wait for a busy core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def overrides_of(group, choice):
    if group == "callbacks":  # some watch what others log, or the objective, or evaluate the best checkpoint
        chosen = dict.fromkeys(["loss", "accuracy", "best_loss", choice])
        needed = [NEEDED[choice]] if choice in NEEDED else []
        return [f"callbacks=[{','.join(chosen)}]", "objective=loss/validation", *needed]
    return [f"{group}={choice}"]


def checked(overrides, tmp_path):
    """Compose a config as the command line does and check it."""
    return check_config(compose_config([*overrides, f"output_dir={tmp_path}"]))


@contextmanager
def built(overrides, tmp_path):
    """Build everything that a run consists of, recorded by no tracker."""
    config = checked([*overrides, "tracker=noop"], tmp_path)
    factory = Factory(config)
    outputs = OutputPaths(config["output_dir"])
    trainer = build_trainer(factory, config["seed"], Interruption())
    record = RunRecord.begin(
        build_tracker(factory, outputs), outputs, config, Launch("", list(overrides)), Provenance()
    )
    try:
        run = Assembly(factory, config, trainer, record).run(None, None)
        yield run
        run.checkpoint_writer.close()
        run.hooks.close()
    finally:
        trainer.data_container.close()
        record.close(EndStatus.FINISHED)


def first_batch(run):
    run.data.open(run.counter, [])
    return run.data.next_training_batch()


def try_out(run):
    """Do one update, and let each callback that evaluates see one batch of its dataset."""
    do_update(run, first_batch(run))
    for callback in run.hooks.callbacks.values():
        if isinstance(callback, DatasetCallback):
            batch = run.trainer.to_device(next(iter(run.data.evaluation_batches(callback.dataset_key))))
            with torch.no_grad(), run.trainer.evaluation():
                callback._process_batch(batch, run.trainer.evaluation_models)
            callback._process_results(run.counter)
    assert all(torch.isfinite(parameter).all() for parameter in run.trainer.model.parameters())
    return run.log_writer.flush()


def test_all_files_are_found():
    assert {(path.parent.name, path.stem) for path in CONF.glob("*/*.yaml")} == set(FILES)
    assert len(FILES) > 20


@pytest.mark.parametrize(("group", "choice"), [pair for pair in FILES if pair[0] not in PARTS])
def test_every_choice_builds(group, choice, tmp_path):
    overrides = overrides_of(group, choice)
    if group == "launcher":
        assert isinstance(Factory(checked(overrides, tmp_path)).build(group, Launcher), Launcher)
        return
    if group == "tracker":
        config = checked(overrides, tmp_path)
        assert isinstance(build_tracker(Factory(config), OutputPaths(tmp_path)), BaseTracker)
        return
    if choice in MISSING:
        with pytest.raises(ConfigError, match=MISSING[choice]), built(overrides, tmp_path):
            pass
        return
    with built(overrides, tmp_path) as run:
        assert run.counter.end_update > 0
        if group == "callbacks":
            assert set(run.hooks.callbacks) > set(OmegaConf.load(CONF / group / f"{choice}.yaml"))


@pytest.mark.parametrize("choice", choices("model"))
def test_every_model_is_trained_on_a_dataset_that_ships(choice, tmp_path):
    refused = []
    for data in choices("data"):
        try:
            with built([f"data={data}", f"model={choice}"], tmp_path) as run:
                do_update(run, first_batch(run))
                return
        except (ConfigError, IndexError, RuntimeError) as error:  # such as a convolution over a table
            refused.append(f"{data}: {error}")
    pytest.fail("\n".join(refused))


@pytest.mark.parametrize("choice", choices("loss"))
def test_every_loss_fits_to_a_dataset_that_ships(choice, tmp_path):
    refused = []
    for data in choices("data"):
        with built([f"data={data}", f"loss={choice}"], tmp_path) as run:
            [part] = first_batch(run)
            try:
                losses, _ = run.trainer.forward(part.batch)
            except (RuntimeError, ValueError) as error:  # such as classes where numbers are needed
                refused.append(f"{data}: {error}")
                continue
        assert torch.isfinite(losses["total"])
        return
    pytest.fail("\n".join(refused))


@pytest.mark.parametrize("choice", choices("data"))
def test_a_dataset_brings_what_fits_to_it(choice, tmp_path):
    with built([f"data={choice}"], tmp_path) as run:
        logged = try_out(run)
    assert {"loss/validation", "loss/validation/ema"} <= logged.keys()


@pytest.mark.parametrize("choice", choices("experiment"))
def test_an_experiment_is_whole(choice, tmp_path):
    header = (CONF / "experiment" / f"{choice}.yaml").read_text().splitlines()[:3]
    assert f"# ksuit-runner experiment={choice}" in header
    with built([f"experiment={choice}"], tmp_path) as run:
        assert try_out(run)


def sweep_overrides():
    """Yield every value that a sweep which ships tries, and the ends of its intervals; seeds fit everywhere."""
    for choice in choices("sweep"):
        params = OmegaConf.to_container(OmegaConf.load(CONF / "sweep" / f"{choice}.yaml").sweep.params)
        for parameter in read_parameters(params, seed=0):
            values = parameter.extremes() if parameter.key != "seed" else parameter.values[:1]
            yield from ((choice, f"{parameter.key}={value}") for value in values)


@pytest.mark.parametrize(("choice", "override"), list(sweep_overrides()))
def test_every_value_of_a_sweep_builds(choice, override, tmp_path):
    with built([f"sweep={choice}", override], tmp_path) as run:
        assert run.counter.end_update > 0


def test_what_is_said_explicitly_wins_over_what_a_dataset_brings(tmp_path):
    with built(["model=linear", "data=diabetes"], tmp_path) as run:
        assert isinstance(run.trainer.model.module, Linear)
        assert isinstance(run.trainer.loss, nn.MSELoss)
    with built(["callbacks=[loss]", "data=diabetes"], tmp_path) as run:
        assert "ema" not in run.hooks.callbacks


def test_no_callback_is_needed(tmp_path):
    overrides = ["callbacks=[]", "default_callbacks=none", "trainer.max_updates=2", "model=linear"]
    with built(overrides, tmp_path) as run:
        assert run.hooks.callbacks == {}
        train(run)
        assert run.counter.update == 2
    with built(["callbacks=[]"], tmp_path) as run:
        assert "train_loss" in run.hooks.callbacks


@pytest.mark.parametrize(
    "overrides",
    [
        ["+callbacks.ema_slow={_target_: callbacks.ema.Ema, decays: [0.999]}"],
        ["+callbacks.ema_slow._target_=callbacks.ema.Ema", "+callbacks.ema_slow.decays=[0.999]"],
    ],
)
def test_a_second_callback_of_a_kind(overrides, tmp_path):
    with built(["model=linear", "callbacks=[ema,accuracy]", *overrides], tmp_path) as run:
        first, second = run.hooks.callbacks["ema"], run.hooks.callbacks["ema_slow"]
        assert isinstance(first, Ema) and isinstance(second, Ema)
        assert (list(first.decays.values()), list(second.decays.values())) == ([0.99], [0.999])
        evaluate(run)
        assert {
            "accuracy/validation",
            "accuracy/validation/ema",
            "accuracy/validation/ema_slow",
        } <= run.log_writer.summary.keys()


def test_a_list_of_callbacks_can_be_added_to(tmp_path):
    with built(["+callbacks=early_stop"], tmp_path) as run:
        assert {"ema", "accuracy", "loss", "best_checkpoint", "early_stop"} <= run.hooks.callbacks.keys()


def test_a_name_that_a_default_callback_has_is_refused(tmp_path):
    overrides = ["+callbacks.progress={_target_: callbacks.ema.Ema}"]
    message = r"callbacks\.progress: default_callbacks has the same name"
    with pytest.raises(ConfigError, match=message), built(overrides, tmp_path):
        pass


def test_conf_of_another_folder_is_not_taken_for_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("conf/model/mine.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("_target_: ksuit_runner.models.linear.Linear\n")
    assert {"mine", "cnn"} <= set(choices("model"))
    with built(["model=mine"], tmp_path) as run:
        assert isinstance(run.trainer.model.module, Linear)

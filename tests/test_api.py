"""``run`` and ``compose``: what the command line does, several times in a process that is left as it was found."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from command import REPOSITORY, checkpoint_bytes, journal, run_dir
from preloaded import ksuit

from ksuit_runner import CallbackBase, ConfigError, compose, run
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import KsuitError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.stored_run import read_config, read_launch

FEW = ("model=linear", "callbacks=[ema,accuracy]", "default_callbacks=none", "trainer.max_epochs=1", "tracker=noop")


class Signal(CallbackBase):
    """Sends this process a signal, or raises what it is given, after the second update."""

    what = signal.SIGINT

    def _after_update(self, update_counter):
        if update_counter.update == 2:
            if isinstance(self.what, BaseException):
                raise self.what
            signal.raise_signal(self.what)


@pytest.fixture
def few(tmp_path):
    return [f"output_dir={tmp_path}", *FEW]


def state_of_process():
    generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    logger = logging.getLogger("ksuit_runner")
    return generators, handlers, (logger.handlers, logger.level, logger.propagate), sys.path, sys.stdout, sys.excepthook


def test_a_run_is_that_of_the_command_line_and_leaves_the_process_as_it_was(tmp_path, few):
    before = state_of_process()
    result = run(["trainer._target_=ksuit_runner.SgdTrainer", "hydra.verbose=true", "sweep=null", *few])
    assert state_of_process() == before
    ksuit(tmp_path / "command", *FEW)
    (other,) = (tmp_path / "command" / "runs").iterdir()
    assert result.folder == tmp_path / "runs" / result.run_id and result.status == "FINISHED" and not result.jobs
    assert journal(result.folder) == journal(other) and checkpoint_bytes(result.folder) == checkpoint_bytes(other)
    accuracy = result.metrics["accuracy/validation/ema"]
    assert accuracy.last == accuracy.best == journal(other)["accuracy/validation/ema", 20] and accuracy.best_step == 20
    with pytest.raises(AttributeError):
        result.status = "FAILED"


def test_a_config_can_be_changed_and_run(tmp_path, few, capsys):
    config = compose(few)
    assert type(config).__name__ == "DictConfig" and "hydra" not in config
    config.trainer.max_epochs = 2
    config.callbacks.loss = {"_target_": "callbacks.loss.Loss", "dataset_key": "validation", "every_n_epochs": 1}
    before = config.copy()
    result = run(config)
    assert config == before and result.metrics["loss/validation"].last_step == 40
    stored = PathProvider(tmp_path, result.run_id)
    assert read_config(stored).trainer.max_epochs == 2
    assert read_launch(stored).command == "ksuit_runner.run(config)"
    assert run([few[0], "resume=last", "trainer.max_epochs=3"]).metrics["loss/validation"].last_step == 60
    capsys.readouterr()
    forked = run([few[0], "fork=last", "optimizer.lr=1e-4"])
    assert "nothing is left to do" in capsys.readouterr().out
    assert forked.run_id != result.run_id and forked.metrics["loss/validation"].last_step == 60
    assert "eval/accuracy/validation" in run([few[0], f"evaluate={forked.run_id}"]).metrics


def test_what_refers_to_hydra_is_that_of_the_config_it_stands_in(few):
    first = compose([*few, "name=${hydra:runtime.choices.model}"])
    compose([*few, "model=mlp"])
    assert first.name == "linear"


def mistake(change, *overrides):
    def make(few):
        config = compose([*few, *overrides])
        change(config)
        return config

    return make


MISTAKES = {
    "value": (mistake(lambda config: config.optimizer.update(lr="abc")), "optimizer.lr: expects a number"),
    "argument": (
        mistake(lambda config: config.callbacks.update(x={"_target_": "callbacks.ema.Ema", "decay": [1]})),
        "callbacks.x.decay: there is no such argument. Did you mean 'decays'?",
    ),
    "public name": (
        mistake(lambda config: config.callbacks.update(x={"_target_": "ksuit_runner.CallbackBas"})),
        "callbacks.x._target_: there is no 'CallbackBas' in 'ksuit_runner'. Did you mean 'CallbackBase'?",
    ),
    "resume": (mistake(lambda config: None, "resume=last"), "resume: a config is for a new run"),
    "sweep": (mistake(lambda config: None, "sweep=seeds"), "sweep: a config is for one run"),
    "launcher": (mistake(lambda config: None, "launcher=joblib"), "launcher: "),
    "text": (lambda few: "model=mlp", "overrides are a list of texts, such as ['model=mlp'], not 'model=mlp'"),
    "override": (lambda few: [*few, "modle=mlp"], "modle=mlp: the config has no 'modle'. Did you mean 'model'?"),
    "no override": (lambda few: [*few, "model"], "'model' is not an override"),
    "flag": (lambda few: [*few, "--help"], "--help: from Python, -m is the only flag"),
    "other command": (lambda few: ["list=10"], "list=: not for run()"),
    "two at once": (lambda few: ["-m", "resume=last"], "resume=last: it cannot be given together with -m"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_an_exception_and_leaves_nothing(tmp_path, few, name):
    make, message = MISTAKES[name]
    with pytest.raises(ConfigError) as error:
        run(make(few))
    assert str(error.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_typo_in_a_changed_config_is_found_at_once(few):
    with pytest.raises(AttributeError, match="sede"):
        compose(few).sede = 1


def test_a_sweep_returns_its_jobs(tmp_path, few):
    result = run(["-m", *few, "callbacks=[accuracy]", "seed=0,1", "objective=accuracy/validation"])
    assert result.status == "FINISHED" and result.folder == tmp_path / "sweeps" / result.run_id
    values = [row.metrics["accuracy/validation"] for row in result.jobs]
    assert sorted(row.values["seed"] for row in result.jobs) == ["0", "1"] and values == sorted(values, reverse=True)
    assert run([few[0], f"resume={result.run_id}"]).jobs == result.jobs


@pytest.mark.parametrize(
    ("what", "raised", "status"),
    [
        (signal.SIGINT, KeyboardInterrupt, "KILLED"),
        (ValueError("mine"), ValueError, "FAILED"),
        (SystemExit(0), KsuitError, "FAILED"),
    ],
)
def test_what_ends_a_run_early_is_raised_after_its_end(tmp_path, few, monkeypatch, what, raised, status):
    monkeypatch.setattr(Signal, "what", what)
    before = state_of_process()
    with pytest.raises(raised):
        run([*few, f"+callbacks.signal._target_={__name__}.Signal"])
    assert state_of_process() == before
    folder = run_dir(tmp_path)
    assert Outbox.load(PathProvider(tmp_path, folder.name)).status == status
    result = run([few[0], "resume=last", "~callbacks.signal"])
    assert result.status == "FINISHED" and result.metrics["accuracy/validation"].last_step == 20


def test_another_thread_may_run_but_not_a_second_one_meanwhile(few, monkeypatch):
    errors, statuses = [], []

    def nested(self, update_counter):
        if update_counter.update == 1:
            with pytest.raises(KsuitError, match="another run is under way in this process") as error:
                run(few)
            errors.append(error.value)

    monkeypatch.setattr(Signal, "_after_update", nested)
    target = f"+callbacks.signal._target_={__name__}.Signal"
    thread = threading.Thread(target=lambda: statuses.append(run([*few, target]).status))
    thread.start()
    thread.join()
    assert statuses == ["FINISHED"] and len(errors) == 1


def test_a_script_finds_the_code_of_its_working_directory(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "net.yaml").write_text("_target_: nets.Net\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(
        f"from ksuit_runner import run\nfew = {list(FEW[1:])}\n"
        "print([run(['model=net', f'seed={seed}', *few]).status for seed in (0, 1)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "scripts/train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['FINISHED', 'FINISHED']", done.stdout + done.stderr
    assert len(list((tmp_path / "outputs" / "runs").iterdir())) == 2

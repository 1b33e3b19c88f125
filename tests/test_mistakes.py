"""Each mistake ends with exit status 2 and a few lines that name the config path and the nearest valid name."""

import shutil
import sqlite3
import subprocess
import sys

import pytest
from command import REPOSITORY, ksuit

from ksuit_runner import run
from ksuit_runner.errors import ConfigError

MISTAKES = {
    "group": (["modle=cnn"], ["modle", "'model'"]),
    "choice": (["model=ccn"], ["model", "'cnn'", "gpt"]),
    "callback choice": (["callbacks=[emma]"], ["callbacks", "'ema'", "--help callbacks"]),
    "override": (["optimizer.lrr=1"], ["optimizer", "'lr'"]),
    "argument of a callback": (["+callbacks.ema.decay=[0.9]"], ["callbacks.ema.decay", "'decays'"]),
    "missing argument": (["~callbacks.accuracy.dataset_key"], ["callbacks.accuracy.dataset_key"]),
    "_target": (["+callbacks.x._target=callbacks.ema.Ema"], ["callbacks.x", "'_target_'"]),
    "class": (["+callbacks.x._target_=callbacks.ema.Emma"], ["callbacks.x._target_", "'Ema'"]),
    "module": (["+callbacks.x._target_=callbacks.emma.Ema"], ["callbacks.x._target_", "'ema'"]),
    "package": (["model._target_=kusit_runner.models.mlp.Mlp"], ["model._target_", "kusit_runner"]),
    "no callback": (["+callbacks.x._target_=torch.nn.Linear"], ["callbacks.x._target_", "CallbackBase"]),
    "function": (["+callbacks.x._target_=torch.nn.functional.softmax"], ["callbacks.x._target_", "function"]),
    "standard library": (["+callbacks.x._target_=os.system"], ["callbacks.x._target_", "standard library"]),
    "type": (["optimizer.lr=abc"], ["optimizer.lr", "a number", "'abc'"]),
    "type of a callback's argument": (["callbacks.ema.decays=abc"], ["callbacks.ema.decays", "'abc'"]),
    "seed": (["seed=one"], ["seed", "a whole number", "'one'"]),
    "interval of 0": (["callbacks.accuracy.every_n_epochs=0"], ["callbacks.accuracy", "at least 1"]),
    "no interval": (["default_callbacks.train_loss.every_n_updates=null"], ["train_loss: one of", "not none"]),
    "dataset": (["callbacks.accuracy.dataset_key=tset"], ["callbacks.accuracy.dataset_key", "'test'", "train"]),
    "metric to watch": (
        ["callbacks.best_checkpoint.metric_key=acuracy/validation"],
        ["metric_key", "'accuracy/validation'"],
    ),
    "metric of the best weights only": (["objective=accuracy/test"], ["objective", "'accuracy/test'"]),
    "early stop": (
        ["callbacks=[accuracy,early_stop]", "callbacks.early_stop.metric_key=loss/tset"],
        ["callbacks.early_stop.metric_key", "loss/t"],
    ),
    "objective": (["objective=accuracy/validaton"], ["objective", "'accuracy/validation'"]),
    "interpolation": (["name=${optimiser.lr}"], ["name", "optimiser"]),
    "unknown run": (["resume=abcdef"], ["resume=abcdef"]),
    "no run": (["fork=last"], ["fork=last"]),
    "lost override": (["callbacks=[ema]", "+callbacks=early_stop"], ["callbacks", "one list"]),
    "origin and sweep": (["fork=last", "-m", "seed=0,1"], ["fork=last", "-m"]),
    "learning rate below 0": (["optimizer.lr=-1", "tracker=noop"], ["optimizer", "-1"]),
    "empty mapping": (["evaluation={}"], ["evaluation={}", "evaluation.dataset=VALUE"]),
    "no choice": (["experiment=null"], ["experiment=[]"]),
    "two origins": (["resume=last", "fork=last"], ["resume", "fork"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_explained_and_leaves_nothing(tmp_path, mistake):
    overrides, words = MISTAKES[mistake]
    outputs = tmp_path / "outputs"
    output = ksuit(outputs, *overrides, status=2)
    lines = output.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 6
    assert all(word in output for word in words), output
    assert not outputs.exists()


def test_the_traceback_of_a_mistake_is_shown_on_request(tmp_path):
    output = ksuit(tmp_path, "optimizer.lr=abc", "hydra.verbose=true", status=2)
    assert output.startswith("Traceback") and ", in check_config" in output
    assert output.splitlines()[-1].startswith("error: optimizer.lr: ")


@pytest.mark.parametrize("overrides", [["callbacks=[emma]"], ["optimizer.lr=abc"], ["resume=abcdef"], ["--help"]])
def test_answers_without_torch_and_mlflow(tmp_path, overrides):
    program = (
        "import sys\n"
        f"sys.argv = ['ksuit_runner', 'output_dir={tmp_path}/outputs', *{overrides!r}]\n"
        "from ksuit_runner.cli.dispatch import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('imported:', sorted({'torch', 'mlflow', 'numpy'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.splitlines()[-1] == "imported: []", result.stdout + result.stderr


def test_ambiguous_run_lists_those_that_fit(tmp_path):
    for run_id in ("abcdef01", "abcdef02"):
        (tmp_path / "runs" / run_id).mkdir(parents=True)
    output = ksuit(tmp_path, "resume=abcdef", status=2)
    assert "abcdef01" in output and "abcdef02" in output


def test_mistake_in_a_project_of_ones_own_names_its_choices(tmp_path):
    (tmp_path / "conf" / "callbacks").mkdir(parents=True)
    (tmp_path / "conf" / "callbacks" / "mine.yaml").write_text("mine:\n  _target_: callbacks.ema.Ema\n")
    output = ksuit(tmp_path / "outputs", "callbacks=[mnie]", status=2, cwd=tmp_path)
    assert "'mine'" in output


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "class Mine(CallbackBase):\n    def on_train_epoch_end(self): ...\n",
            ["Mine.on_train_epoch_end", "_after_epoch"],
        ),
        (
            "import not_there\nclass Mine(CallbackBase): ...\n",
            ["No module named 'not_there'", "own_watcher.py, line 2"],
        ),
    ],
)
def test_what_is_raised_by_an_import_leaves_nothing(tmp_path, monkeypatch, source, words):
    (tmp_path / "own_watcher.py").write_text(f"from ksuit_runner import CallbackBase\n{source}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        run(["model=linear", "callbacks=[]", "+callbacks.mine._target_=own_watcher.Mine"])
    assert all(word in str(raised.value) for word in words), raised.value
    assert not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("stop_at", r"callbacks\.stop_at: one of epoch, update, sample, max_time is needed"),  # of a constructor
        ("export_model weights=emma", r"callbacks\.export_model\.weights: there are no weights 'emma'"),
        ("accuracy topk=[11] every_n_epochs=2", r"callbacks\.accuracy\.topk: 11 is more than the 10 classes"),
        ("mean_iou outputs=mask", r"callbacks\.mean_iou\.outputs: there are no several outputs"),
        ("online_accuracy topk=[11]", r"callbacks\.online_accuracy\.topk: 11 is more than the 10 classes"),
    ],
)
def test_what_is_refused_before_the_first_update_leaves_no_run(
    tmp_path, template, monkeypatch, capfd, callback, message
):
    name, *given = callback.split()
    is_tracked = callback.startswith("accuracy")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(template, tmp_path / "outputs")
    with pytest.raises(ConfigError, match=message):
        run(
            [
                *("model=linear", f"callbacks=[{name}]", *(f"++callbacks.{name}.{item}" for item in given)),
                *("trainer.device=cpu", f"tracker={'mlflow' if is_tracked else 'noop'}"),
            ]
        )
    assert not list((tmp_path / "outputs" / "runs").iterdir())
    output = "".join(capfd.readouterr())
    assert output.count("error: ") == 1 and "resume" not in output
    if is_tracked:
        with sqlite3.connect(tmp_path / "outputs" / "mlflow.db") as store:
            assert store.execute("select lifecycle_stage from runs").fetchall() == [("deleted",)]


def test_changes_of_a_resume_that_is_refused_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("tracker=noop", "trainer.device=cpu")
    run(["model=linear", "callbacks=[]", "trainer.max_updates=2", "checkpoint=at_end", *common])
    (folder,) = tmp_path.glob("outputs/runs/*")
    files = [
        folder / "artifacts/config.yaml",
        folder / "artifacts/launch.json",
        *folder.glob("artifacts/checkpoints/*/*"),
    ]
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(ConfigError, match="11 is more than the 10 classes"):
        run(["resume=last", "callbacks=[accuracy]", "callbacks.accuracy.topk=[11]", "trainer.max_updates=4"])
    assert {path: path.read_bytes() for path in files} == before
    run(["resume=last", "trainer.max_updates=4"])
    assert list(folder.glob("artifacts/checkpoints/*_U4_*"))

"""The wheel, installed where there is nothing but what it depends on, runs a project that has its own parts."""

import os
import re
import sqlite3
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = re.compile(r"\|\s+(?:torch|mlflow|sklearn)$", re.MULTILINE)

pytestmark = pytest.mark.slow

PROJECT = {
    "callbacks/mine.py": '''
"""Logs the largest weight."""

from ksuit_runner.callback_bases.periodic import PeriodicCallback


class Mine(PeriodicCallback):
    """Logs ``largest_weight``."""

    logs = ("largest_weight",)

    def _periodic_callback(self, update_counter):
        self.writer.add_scalar("largest_weight", max(p.abs().max() for p in self.model.parameters()))
''',
    "networks.py": '''
"""A network of one's own, which is no ModelBase."""

from math import prod

from torch import nn


class Net(nn.Sequential):
    """One layer."""

    def __init__(self, input_shape, output_shape):
        super().__init__(nn.Flatten(), nn.Linear(prod(input_shape), *output_shape))
''',
    "conf/callbacks/mine.yaml": "mine:\n  _target_: callbacks.mine.Mine\n  every_n_epochs: 1\n",
    # The name is that of a file that ships: the project's own one counts.
    "conf/callbacks/accuracy.yaml": """
accuracy:
  _target_: callbacks.accuracy.Accuracy
  dataset_key: test
  topk: [1, 3]
  every_n_epochs: 1
""",
    "conf/model/net.yaml": "_target_: networks.Net\n",
    "conf/experiment/mine.yaml": """# @package _global_
defaults:
  - override /model: net
  - override /callbacks: [ema, accuracy, mine]
name: mine
trainer:
  max_epochs: 2
""",
}

FOREIGN = {
    "__init__.py": "raise SystemExit('imported the callbacks of another distribution')",
    "ema.py": "class Ema:\n    foreign = True\n",
    "other.py": "",
}
# The three ways in which a project may have callbacks, each imported from source and by Python.
LAYOUTS = {
    "folder": {"callbacks/mine.py": "class Mine:\n    pass\n"},
    "package": {
        "callbacks/__init__.py": "from callbacks.ema import Ema\nfrom callbacks.mine import Mine\n",
        "callbacks/mine.py": "class Mine:\n    pass\n",
    },
    "module": {"callbacks.py": "from callbacks.ema import Ema\n\n\nclass Mine:\n    pass\n"},
}
LOOK_UP = """
import os, pickle, sys
import torch
import ksuit_runner
from ksuit_runner.config.check.signature_lookup import Sources

for folder in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0, folder
        continue
    os.chdir(folder)
    names = ["callbacks.ema.Ema", "callbacks.Mine" if folder == "module" else "callbacks.mine.Mine"]
    found = [Sources().locate(name).module.file for name in names]
    import callbacks.other
    made = [pickle.loads(f"c{name.rpartition('.')[0]}\\n{name.rpartition('.')[2]}\\n.".encode()) for name in names]
    assert found == [sys.modules[item.__module__].__file__ for item in made]
    print(*found, sep="\\n", flush=True)
    os._exit(0)
"""


def call(*command, cwd, **environment):
    """Run a command as a user would who knows nothing of this repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    call(*build, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_dir(wheel, tmp_path_factory):
    """Make an environment with the wheel in it and return its folder of programs.

    What the wheel depends on is found in the environment of this process; a repository that is installed there as
    editable is not, since its .pth file is not read.
    """
    environment = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    install = ("install", "--no-index", "--no-deps", "--disable-pip-version-check", wheel)
    call(sys.executable, "-m", "pip", "--python", python, *install, cwd=environment)
    (site_packages,) = environment.glob("lib/*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "callbacks").mkdir()  # as another distribution may install one
    for name, text in FOREIGN.items():
        (site_packages / "callbacks" / name).write_text(text)
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    return python.parent


@pytest.fixture
def project(tmp_path):
    for name, text in PROJECT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def metrics_of(project):
    with sqlite3.connect(project / "outputs" / "mlflow.db") as database:
        metrics = dict(database.execute("select key, value from latest_metrics"))
        runs = database.execute("select name, status from runs").fetchall()
    database.close()
    return metrics, runs


def test_everything_that_ships_is_in_it(wheel):
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("ksuit_runner/**/*.py")}
    expected |= {f"ksuit_runner/_shipped/{path.relative_to(ROOT)}" for path in ROOT.glob("conf/**/*.yaml")}
    expected |= {f"ksuit_runner/_shipped/{path.relative_to(ROOT)}" for path in ROOT.glob("callbacks/**/*.py")}
    project = [
        path for path in ROOT.glob("examples/spirals/**/*") if path.is_file() and "__pycache__" not in path.parts
    ]
    expected |= {f"ksuit_runner/_shipped/{path.relative_to(ROOT)}" for path in project}
    expected.add("ksuit_runner/py.typed")
    assert expected <= names
    others = {name for name in names if ".dist-info/" not in name} - expected
    assert not others


def test_a_project_adds_callbacks_in_any_way(bin_dir, tmp_path):
    for layout, files in LAYOUTS.items():
        for name, text in files.items():
            path = tmp_path / layout / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    done = call(bin_dir / "python", "-c", LOOK_UP, *LAYOUTS, cwd=tmp_path)
    shipped, own = done.stdout.split()[::2], done.stdout.split()[1::2]
    assert len(set(shipped)) == 1 and shipped[0].endswith("/ksuit_runner/_shipped/callbacks/ema.py")
    assert own == [str(tmp_path / layout / [*files][-1]) for layout, files in LAYOUTS.items()]


def test_a_project_with_its_own_conf_and_callbacks(bin_dir, project):
    done = call(bin_dir / "python", "-m", "ksuit_runner", "experiment=mine", cwd=project)
    metrics, runs = metrics_of(project)
    assert runs == [("mine", "FINISHED")]
    own, shipped = {"largest_weight", "accuracy_top3/test"}, {"accuracy/test", "accuracy/test ema", "loss/train"}
    assert own | shipped <= metrics.keys()
    assert metrics["accuracy_top3/test"] > metrics["accuracy/test"] > 0.5
    assert "largest_weight" in done.stdout
    made = {path.name for path in project.iterdir()} - {"__pycache__"}
    assert made == {"callbacks", "conf", "networks.py", "outputs"}


def test_the_console_script_runs_and_resumes_it(bin_dir, project):
    program = bin_dir / "ksuit-runner"
    call(program, "experiment=mine", "tracker=noop", "callbacks=[mine]", "trainer.max_epochs=1", cwd=project)
    done = call(program, "resume=last", "trainer.max_epochs=2", cwd=project)
    assert "starts from checkpoint E1_" in done.stdout
    assert "ksuit-runner resume=" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "ksuit-runner"),
        (["--cfg", "job", "experiment=mine"], "callbacks.mine.Mine"),
        (["-sc", "install=bash"], "-F hydra_bash_completion ksuit-runner"),
    ],
)
def test_answers_that_need_no_torch(arguments, expected, bin_dir, project):
    done = call(bin_dir / "ksuit-runner", *arguments, cwd=project, PYTHONPROFILEIMPORTTIME="1")
    assert expected in done.stdout
    assert "hydra" in done.stderr
    assert not HEAVY.search(done.stderr)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mod", {"model="}),
        ("model=", {"model=cnn", "model=net"}),
        ("optimizer.l", {"optimizer.lr="}),
        ("experiment=mine callbacks.mine.", {"callbacks.mine.every_n_epochs="}),
    ],
)
def test_shell_completion(line, expected, bin_dir, project):
    line = f"ksuit-runner {line}"
    position = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    query = (bin_dir / "ksuit-runner", "-sc", "query=bash")
    done = call(*query, cwd=project, PYTHONPROFILEIMPORTTIME="1", **position)
    assert expected <= set(done.stdout.split())
    assert not HEAVY.search(done.stderr)


def test_bash_completes(bin_dir, project):
    """Set a shell up as the help says, then ask it for what it would offer after a press of the tabulator."""
    line = "ksuit-runner model=n"
    script = f"""
eval "$(ksuit-runner -sc install=bash)"
COMP_LINE='{line}' COMP_POINT={len(line)} COMP_CWORD=1
hydra_bash_completion
echo "offers: ${{COMPREPLY[*]}}"
"""
    path = os.pathsep.join([str(bin_dir), os.environ["PATH"]])
    done = call("bash", "--noprofile", "--norc", "-c", script, cwd=project, PATH=path)
    assert "offers: model=net" in done.stdout

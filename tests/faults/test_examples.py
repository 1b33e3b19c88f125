"""Every example is killed and resumed with other numbers of workers, and ends like the run that was not."""

import re
import shutil
import signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from command import REPOSITORY, checkpoint_bytes, journal, logged_files, mlflow_points, run_dir
from crashes import Kill, prepare_process
from packaging.requirements import Requirement
from preloaded import Preloaded

EXAMPLES = sorted(path.parent for path in (REPOSITORY / "examples").glob("*/conf"))
# They import what takes many seconds, in each of their processes.
LONG = ("distilbert", "graphs", "lora", "mixup_vit")


def missing(folder: Path) -> list[str]:
    """Return what of an example's requirements.txt is not installed."""
    file, found = folder / "requirements.txt", []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            version(Requirement(line).name)
        except PackageNotFoundError:
            found.append(line)
    return found


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=[pytest.mark.soak] if path.name in LONG else []) for path in EXAMPLES],
    ids=lambda path: path.name,
)
def test_an_example_survives_a_kill(example, template, tmp_path):
    if lacking := missing(example):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    folder = shutil.copytree(example, tmp_path / example.name)
    preloaded, logs = Preloaded(), tmp_path / "logs"
    logs.mkdir()

    def ksuit(outputs, *arguments, kill=None):
        kill, struck = kill or Kill(None), tmp_path / "struck"
        given = [*arguments, f"output_dir={outputs}", f"data.num_workers={kill.workers}"]
        log = logs / f"{len(list(logs.iterdir()))}"
        command = preloaded.start(folder, log, given, prepare_process, kill, None, struck)
        assert command.wait() == (-signal.SIGKILL if kill.point else 0), command.output()

    whole, killed = (shutil.copytree(template, tmp_path / name) for name in ("whole", "killed"))
    run = [f"experiment={example.name}", "checkpoint=every_100_updates", "checkpoint.every_n_updates=2"]
    ksuit(whole, *run)
    updates = max(step for _, step in journal(run_dir(whole)))
    assert updates >= 6, "too short to be killed in the middle"
    half = updates // 2 | 1  # between two checkpoints
    ksuit(killed, *run, kill=Kill("after an update", half, workers=2))
    assert max(step for _, step in journal(run_dir(killed))) < updates
    ksuit(killed, "resume=last", kill=Kill(None, workers=1))
    assert journal(run_dir(killed)) == journal(run_dir(whole))
    assert mlflow_points(killed) == mlflow_points(whole)
    assert checkpoint_bytes(run_dir(killed)) == checkpoint_bytes(run_dir(whole))
    assert logged_files(run_dir(killed)) == logged_files(run_dir(whole))


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda path: path.name)
def test_the_code_in_the_docs_is_that_of_the_examples(page):
    blocks = re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', page.read_text(), re.MULTILINE | re.DOTALL)
    for name, code in blocks:
        text = (REPOSITORY / name).read_text()
        for part in re.split(r"^\s*(?:#\s*)?\.\.\.\n", code, flags=re.MULTILINE):
            assert part.strip("\n") in text, f"{name} does not contain:\n{part}"


def test_every_example_says_how_it_is_run():
    for example in EXAMPLES:
        file = example / "conf" / "experiment" / f"{example.name}.yaml"
        assert f"ksuit-runner experiment={example.name}" in file.read_text(), file

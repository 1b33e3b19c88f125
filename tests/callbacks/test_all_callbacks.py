"""All callbacks that ship, together: they disturb nothing, and a kill, a resume and a second rank change nothing."""

import json
import re
from pathlib import Path

import pytest
from command import checkpoint_bytes, journal, logged_files, run_dir, stop_at
from omegaconf import OmegaConf
from preloaded import ksuit, start
from ranks import ksuit_on_ranks
from safetensors import safe_open

from ksuit_runner.config.compose import compose_config
from ksuit_runner.config.groups import choices, shipped_conf

pytestmark = pytest.mark.slow

# Checkpoints within epochs, all of which are kept; two parts, of which each rank can have one.
COMMON = (
    "checkpoint=every_100_updates",
    "checkpoint.every_n_updates=25",
    "checkpoint.keep_last=9",
    "strategy=ddp",
    "trainer.accumulation_steps=2",
)
GIVEN = ("debug=all_callbacks", *COMMON)
# The same 60 updates.
BARE = ("model=mlp", "tracker=noop", "trainer.max_epochs=3", "callbacks=[]", "default_callbacks=none", *COMMON)
# Those that need what is not everywhere (a GPU, an address to send to), or data of another kind than the digits.
EXCEPTED = {"memory_snapshot", "notify", "regression_errors"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    ksuit(folder, *GIVEN)
    return run_dir(folder)


def of_training(directory):
    """Return what each checkpoint has of training itself: the bytes of the model, and the state of the trainer."""
    found = {}
    for folder in (directory / "artifacts" / "checkpoints").glob("E*"):
        state = json.loads((folder / "trainer.json").read_text())["trainer"]
        with safe_open(folder / "trainer.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith("/trainer/")]  # noqa: SIM118 - it is no dict
            tensors = {name: file.get_tensor(name).numpy().tobytes() for name in names}
        found[folder.name] = ((folder / "model.safetensors").read_bytes(), state, tensors)
    return found


def written_weights(directory):
    folder = directory / "artifacts" / "weights"
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


def assert_same(run, reference):
    assert written_weights(run) == written_weights(reference) != {}
    assert journal(run) == journal(reference)
    assert logged_files(run) == logged_files(reference)
    assert checkpoint_bytes(run) == checkpoint_bytes(reference)


def test_no_callback_that_ships_is_missing():
    listed = compose_config(["debug=all_callbacks"])["callbacks"]
    shipped = [
        name
        for choice in choices("callbacks")
        for name in OmegaConf.load(shipped_conf() / "callbacks" / f"{choice}.yaml")
    ]
    assert sorted(listed) == sorted(set(shipped) - EXCEPTED)


def test_every_callback_is_in_the_documentation():
    docs = Path(__file__).parents[2] / "docs"
    table, gallery = ((docs / name).read_text() for name in ("callbacks.md", "gallery.md"))
    for name in choices("callbacks"):
        assert f"`{name}`" in table, name
        assert f"## {name}\n" in gallery or f"`{name}` (" in gallery, name
    for picture in re.findall(r"\]\((.+)\)", gallery):
        assert (docs / picture).is_file(), picture


def test_every_callback_has_one_file_of_code_and_one_test():
    root = Path(__file__).parents[2]
    code = {path.stem for path in (root / "callbacks").glob("*.py")}
    tests = {path.stem.removeprefix("test_") for path in (root / "tests" / "callbacks").glob("test_*.py")}
    assert code <= tests, code - tests


def test_training_is_the_same_without_them(undisturbed, tmp_path):
    ksuit(tmp_path, *BARE)
    alone, together = of_training(run_dir(tmp_path)), of_training(undisturbed)
    assert alone == {name: together[name] for name in alone}
    assert len(alone) == 3


def test_killed_and_resumed_it_is_the_run_that_was_never_killed(undisturbed, tmp_path):
    process = start(tmp_path, *GIVEN)
    stop_at(process, tmp_path, update=30)
    ksuit(tmp_path, "resume=last")
    assert_same(run_dir(tmp_path), undisturbed)


def test_two_ranks_do_what_one_process_does(undisturbed, tmp_path):
    ksuit_on_ranks(tmp_path, 2, *GIVEN)
    assert_same(run_dir(tmp_path), undisturbed)

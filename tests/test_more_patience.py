"""A run that a callback has ended early continues when that callback is given other settings, or removed."""

import shutil

import pytest
from command import checkpoint_bytes, journal, run_dir
from hydra.core.global_hydra import GlobalHydra

from ksuit_runner.cli.dispatch import _main
from ksuit_runner.engine import loop
from ksuit_runner.record.origin import Origin

RUN = (
    *("model=linear", "trainer.max_epochs=6", "tracker=noop", "default_callbacks=none"),
    *("callbacks=[accuracy,early_stop]", "callbacks.early_stop.min_delta=0.9"),
)


def ksuit(folder, *overrides):
    GlobalHydra.instance().clear()
    return _main([f"output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    assert ksuit(folder, *RUN, "callbacks.early_stop.patience=1") == 0
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "outputs")


def updates(folder):
    return max(step for _, step in journal(run_dir(folder)))


def test_with_more_patience_it_ends_like_one_that_had_it_from_the_start(copy, tmp_path, capsys):
    assert updates(copy) == 40
    assert ksuit(copy, "resume=last", "callbacks.early_stop.patience=3") == 0
    patient = tmp_path / "patient"
    assert ksuit(patient, *RUN, "callbacks.early_stop.patience=3") == 0
    assert updates(copy) == updates(patient) == 80
    assert journal(run_dir(copy)) == journal(run_dir(patient))
    assert checkpoint_bytes(run_dir(copy)) == checkpoint_bytes(run_dir(patient))
    capsys.readouterr()
    assert ksuit(copy, "resume=last", "name=other") == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_without_what_ended_it_it_continues_to_its_end(copy):
    assert ksuit(copy, "resume=last", "~callbacks.early_stop", "resume_strict=false") == 0
    assert updates(copy) == 120


def test_it_continues_also_when_it_was_killed_before_its_next_checkpoint(copy, monkeypatch):
    with monkeypatch.context() as patch:

        def killed(*arguments):
            raise KeyboardInterrupt

        patch.setattr(loop, "do_update", killed)
        patch.setattr(loop, "save_last_full_update", lambda *arguments: None)
        assert ksuit(copy, "resume=last", "callbacks.early_stop.patience=9") == 130
    assert ksuit(copy, "resume=last") == 0
    assert updates(copy) == 120


@pytest.mark.parametrize(
    ("changes", "stopped_by", "continues"),
    [
        (["callbacks.stop.patience"], ["stop"], True),
        (["callbacks.stop"], ["stop"], True),
        (["callbacks"], ["stop"], True),
        (["default_callbacks.stop.x"], ["stop"], True),
        (["callbacks.stopper.patience", "callbacks.accuracy"], ["stop"], False),
        (["callbacks.stop.patience"], ["stop", "prune"], False),
        (["callbacks.stop.patience", "callbacks.prune"], ["stop", "prune"], True),
        (["trainer.max_epochs"], ["stop"], False),
        (["callbacks.stop.patience"], [], False),
    ],
)
def test_what_has_ended_it_must_have_changed(changes, stopped_by, continues):
    assert Origin("resume", "a", tuple(changes)).changes_all(stopped_by) is continues

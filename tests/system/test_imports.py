"""What is imported is left alone by the garbage collector, in processes of our own only."""

import gc
import subprocess
import sys

import pytest

from ksuit_runner.system import imports
from ksuit_runner.system.imports import own_process, quick_imports


@pytest.fixture
def thawed(monkeypatch):
    monkeypatch.setattr(imports, "_owns_process", False)
    before = gc.get_freeze_count()
    yield
    if gc.get_freeze_count() > before:
        gc.unfreeze()


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "imported_quickly.py").write_text("import gc\nwas_enabled = gc.isenabled()")
    monkeypatch.syspath_prepend(tmp_path)
    yield "imported_quickly"
    sys.modules.pop("imported_quickly", None)


def test_nothing_is_collected_during_an_import(module, thawed):
    before = gc.get_freeze_count()
    with quick_imports(before_runs=True):
        found = __import__(module)
    assert not found.was_enabled and gc.isenabled() and gc.get_freeze_count() == before


def test_a_collector_that_the_user_has_switched_off_stays_off(module, thawed):
    gc.disable()
    try:
        with quick_imports():
            __import__(module)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_it_is_switched_on_again_after_an_import_that_fails(thawed):
    with pytest.raises(ModuleNotFoundError), quick_imports():
        __import__("nothing_of_this_name")
    assert gc.isenabled()


def test_a_process_of_our_own_leaves_alone_what_was_imported(module, thawed):
    own_process()
    before = gc.get_freeze_count()
    with quick_imports(before_runs=True):
        pass
    assert gc.get_freeze_count() == before  # garbage would be kept as well, for nothing
    with quick_imports(before_runs=True):
        __import__(module)
    assert gc.get_freeze_count() > before and gc.isenabled()


def test_an_import_for_a_run_keeps_nothing_of_it(module, thawed):
    own_process()
    before = gc.get_freeze_count()
    with quick_imports():
        __import__(module)
    assert gc.get_freeze_count() == before and gc.isenabled()


def test_the_command_leaves_alone_torch_when_it_trains(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/frozen.py").write_text(
        "import gc\nfrom ksuit_runner import CallbackBase\n\n\nclass Frozen(CallbackBase):\n"
        "    def _after_training(self, update_counter):\n"
        "        open('frozen', 'w').write(f'{gc.get_freeze_count()} {gc.isenabled()}')\n"
    )
    words = ["model=mlp", "callbacks=[]", "+callbacks.frozen._target_=callbacks.frozen.Frozen", "tracker=noop"]
    command = [sys.executable, "-m", "ksuit_runner", *words, "trainer.max_epochs=1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    count, is_enabled = (tmp_path / "frozen").read_text().split()
    assert int(count) > 100_000 and is_enabled == "True"

"""What looks into a model that the trainer compiles: it is exact, or refused at the start, all of it in one error."""

import shutil

import pytest
from command import checkpoint_bytes, journal, logged_files, run_dir, stop_at
from preloaded import ksuit, start

COMPILED = ("model=mlp", "tracker=noop", "trainer.compile=true")
AT_START = ("dead_units", "knn_probe", "logistic_regression_probe", "features")
INSIDE = (
    "callbacks=[ema,dead_units,knn_probe,logistic_regression_probe,features,output_statistics]",
    'callbacks.dead_units.match=["hidden.{}"]',
    'callbacks.knn_probe.layers=["hidden.*"]',
    'callbacks.features.layers=["hidden.*"]',
    *(f"+callbacks.{name}.at_start=true" for name in AT_START),
    "callbacks.output_statistics.every_n_epochs=null",
    "+callbacks.output_statistics.every_n_updates=7",
    "checkpoint=every_100_updates",
    "checkpoint.every_n_updates=10",
    "checkpoint.keep_last=9",
    "trainer.max_epochs=2",
)


def test_all_that_cannot_watch_compiled_code_are_named_at_once(tmp_path):
    output = ksuit(tmp_path, *COMPILED, "callbacks=[flops,accuracy,nan_watch,activation_norms]", status=2)
    assert "error: callbacks.flops: flops_per_sample: it is needed with trainer.compile" in output
    for name in ("nan_watch", "activation_norms"):
        assert f"\ncallbacks.{name}: nothing inside of a compiled model can be watched" in output
    assert "callbacks.accuracy" not in output and not list((tmp_path / "runs").glob("*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_what_looks_into_layers_is_exact(tmp_path):
    ksuit(tmp_path / "whole", *COMPILED, *INSIDE)
    whole = run_dir(tmp_path / "whole")
    stop_at(start(tmp_path / "cut", *COMPILED, *INSIDE), tmp_path / "cut", update=14)
    ksuit(tmp_path / "cut", "resume=last")
    cut = run_dir(tmp_path / "cut")
    assert journal(cut) == journal(whole)
    assert logged_files(cut) == logged_files(whole) != {}
    assert checkpoint_bytes(cut) == checkpoint_bytes(whole)
    assert ("outputs/output/std", 35) in journal(whole)
    ksuit(tmp_path / "eager", *COMPILED[:2], *INSIDE, "trainer.max_updates=1")  # begins with the same weights
    at_start = {key: value for key, value in journal(run_dir(tmp_path / "eager")).items() if key[1] == 0}
    assert len(at_start) >= 8
    assert {key: value for key, value in journal(whole).items() if key[1] == 0} == at_start
    [name, *_] = [name for name in logged_files(whole) if "features" in str(name)]
    assert logged_files(whole)[name] == logged_files(run_dir(tmp_path / "eager"))[name]

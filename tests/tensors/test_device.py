import os
import subprocess
import sys

import pytest
import torch
from command import REPOSITORY, SMALL

from ksuit_runner.tensors.device import deterministic_kernels

WHOLE_RUN = """
import sys
from ksuit_runner.cli.dispatch import main
sys.argv = ["ksuit_runner", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert end.code == 0
    print(sorted({"torch._dynamo", "torch._inductor"} & sys.modules.keys()))
"""
COMPILER = """
import torch
from ksuit_runner.tensors.device import deterministic_kernels
with deterministic_kernels(True):
    import torch._inductor.config as config
    if not hasattr(config, "deterministic"):
        print("none")
        raise SystemExit
    print(torch.are_deterministic_algorithms_enabled(), config.deterministic)
    with deterministic_kernels(False):
        print(torch.are_deterministic_algorithms_enabled(), config.deterministic)
print(torch.are_deterministic_algorithms_enabled(), config.deterministic)
"""


def python(script, *arguments):
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(tmp_path):
    assert python(WHOLE_RUN, *SMALL, f"output_dir={tmp_path}", "callbacks=[ema,accuracy]")[-1] == "[]"


def test_the_compiler_learns_that_kernels_are_to_be_deterministic(tmp_path):
    printed = python(COMPILER)
    if printed == ["none"]:
        pytest.skip("this torch's compiler has no such switch")
    assert printed == ["True True", "False False", "False False"]


@pytest.mark.parametrize("enabled", [True, False])
def test_kernels_are_chosen_for_the_block_only(monkeypatch, enabled):
    """Cudnn's benchmark chooses kernels by their speed in a trial, which differs from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ZeroDivisionError), deterministic_kernels(enabled):
        assert torch.are_deterministic_algorithms_enabled() is enabled
        assert not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is enabled
        raise ZeroDivisionError
    assert torch.backends.cudnn.benchmark and torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()

import os
import subprocess
import sys

import pytest
import torch
from command import REPOSITORY, SMALL

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.kernels import check_deterministic, chosen_kernels

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
from ksuit_runner.tensors.kernels import chosen_kernels
with chosen_kernels(True):
    import torch._inductor.config as config
    if not hasattr(config, "deterministic"):
        print("none")
        raise SystemExit
    print(torch.are_deterministic_algorithms_enabled(), config.deterministic)
    with chosen_kernels(False):
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
    with pytest.raises(ZeroDivisionError), chosen_kernels(enabled):
        assert torch.are_deterministic_algorithms_enabled() is enabled
        assert not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "a later run of this process may need it"
        raise ZeroDivisionError
    assert torch.backends.cudnn.benchmark and torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("enabled", "precision", "convolutions"), [(True, "high", True), (False, "highest", False)])
def test_tf32_is_chosen_for_the_block_only(enabled, precision, convolutions):
    def found():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    assert (before := found()) == ("highest", True), "torch's own"
    with chosen_kernels(True, None):
        assert found() == before
    with pytest.raises(ZeroDivisionError), chosen_kernels(True, enabled):
        assert found() == (precision, convolutions)
        raise ZeroDivisionError
    assert found() == before


def test_a_process_that_sets_the_precision_in_another_way_is_told(monkeypatch):
    def refuse():
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    with pytest.raises(ConfigError, match="trainer.tf32: .*null"), chosen_kernels(True, True):
        pass
    with chosen_kernels(True, None):
        pass


def test_cuda_that_was_started_otherwise_is_found_before_training(monkeypatch):
    """Torch looks once per process, at the first matrix product."""
    torch_says = "To enable deterministic behavior, you must set CUBLAS_WORKSPACE_CONFIG=:4096:8"
    answers = [RuntimeError(torch_says), torch.cuda.OutOfMemoryError("CUDA out of memory"), None]
    ones, device = torch.ones, torch.device("cuda", 1)

    def product(one, other):
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(torch, "ones", lambda *sizes, device: ones(*sizes))
    monkeypatch.setattr(torch, "mm", product)
    with pytest.raises(ConfigError, match=r"(?s)trainer.deterministic: .* before the run, .*CUBLAS_WORKSPACE_CONFIG"):
        check_deterministic(device)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        check_deterministic(device)
    check_deterministic(device)
    check_deterministic(torch.device("cpu"))
    assert not answers

import subprocess
import sys

from command import REPOSITORY, SMALL

WHOLE_RUN = """
import sys
from ksuit_runner.__main__ import main
sys.argv = ["ksuit_runner", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert end.code == 0
    print(sorted({"torch._dynamo", "torch._inductor"} & sys.modules.keys()))
"""
COMPILER = """
import torch
from ksuit_runner.device import deterministic_kernels
with deterministic_kernels(True):
    import torch._inductor.config as config
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
    assert python(COMPILER) == ["True True", "False False", "False False"]

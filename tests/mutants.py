"""Changes a module in small ways, one at a time, and counts which changes its tests notice.

    make mutants MODULE=record/journal                          # ksuit_runner/record/journal.py
    make mutants MODULE=data/batch_plan ARGS="--sample 60"    # 60 mutants at random instead of all

Survivors are printed with their lines: a test is missing, or both versions are equivalent. The changes are Cosmic
Ray's, and omitted statements. Not changed are type hints, assertions, decorators of classes, messages of errors and
the log, the indentation of JSON, and numbers over 999, which limit sizes and times. Everything happens in a copy of
the project; a mutant is tested in a fork of a process that has imported torch and MLflow already.
"""

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parents[1]
COPIED = ("callbacks", "conf", "ksuit_runner", "tests", "pyproject.toml", "README.md", "Makefile")
_DISK = "tests/faults/test_disk_order.py"
_POWER = f"{_DISK}::test_a_power_cut_leaves_the_old_version_or_the_new_one"
TESTS = {
    # Tests of a module besides tests/test_MODULE*.py, the quick ones first.
    "system/background": ("tests/delivery/test_metric_sender.py", "tests/delivery/test_artifact_uploader.py"),
    "delivery/delivered": ("tests/delivery/test_outbox.py", "tests/delivery/test_binding.py"),
    "delivery/registration": ("tests/delivery/test_outbox.py", "tests/delivery/test_binding.py"),
    "delivery/recording": ("tests/delivery/test_binding.py",),
    "checkpoint/writer": ("tests/checkpoint/test_state.py", "tests/engine/test_loop_ends.py"),
    "checkpoint/format": ("tests/checkpoint/test_writer.py", "tests/checkpoint/test_state.py"),
    "checkpoint/commit": ("tests/checkpoint/test_writer.py", _DISK),
    "checkpoint/folders": ("tests/checkpoint/test_commit.py", "tests/checkpoint/test_writer.py"),
    "system/atomic_files": (_DISK,),
    "engine/hooks": (
        *("tests/engine/test_loop_ends.py", "tests/engine/test_logging.py", "tests/test_callback_base.py"),
        *("tests/engine/test_evaluation_only.py", "tests/test_callback_draws.py", "tests/trainer/test_modes.py"),
        "tests/engine/test_failed_run.py",
    ),
    "engine/agenda": ("tests/engine/test_hooks.py", "tests/engine/test_start_and_end.py"),
    "engine/pass_groups": ("tests/engine/test_shared_pass.py",),
    "engine/restore": (
        *("tests/checkpoint/test_state.py", "tests/engine/test_states_of_ranks.py", "tests/engine/test_step_seeds.py"),
        *("tests/tensors/test_layout.py", "tests/engine/test_failed_run.py"),
    ),
    "distributed/peer_watch": ("tests/distributed/test_several_ranks.py",),
    "start/supervised_rank": ("tests/start/test_supervisor.py",),
    "schedule": ("tests/trainer/test_plateau.py", "tests/trainer/test_optimizers.py"),
    "trainer/optimizers": ("tests/trainer/test_sgd.py", "tests/callbacks/test_learning_rate.py"),
    "trainer/optimizer_step": (
        *("tests/trainer/test_optimizers.py", "tests/trainer/test_closures.py", "tests/trainer/test_sgd.py"),
        *("tests/trainer/test_other_weights.py", "tests/callbacks/test_gradient_norm.py"),
    ),
    "record/journal": (
        f"{_POWER}[the journal]",
        "tests/delivery/test_tracked_points.py",
        "tests/delivery/test_metric_sender.py",
    ),
    "engine/loop": (
        *(
            "tests/engine/test_logging.py",
            "tests/engine/test_thaw.py",
            "tests/engine/test_evaluation_only.py",
            "tests/checkpoint/test_state.py",
        ),
        *("tests/trainer/test_modes.py", "tests/engine/test_failed_run.py", "tests/test_callback_draws.py"),
    ),
    "checkpoint/manifest": ("tests/checkpoint/test_format.py",),
    "system/lock_file": ("tests/system/test_run_lock.py",),
    "system/run_lock": ("tests/system/test_two_owners.py",),
    "engine/run": ("tests/engine/test_loop.py", "tests/engine/test_loop_ends.py", "tests/engine/test_failed_run.py"),
    "checkpoint/host_buffers": ("tests/checkpoint/test_writer.py", "tests/tensors/test_layout.py"),
}
PRELOADED = ("pytest", "torch", "torch._dynamo", "hypothesis", "numpy", "mlflow.store.tracking.sqlalchemy_store")
OPERATORS = (
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_Gt", "Gt_Lt")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("BitOr_BitAnd", "BitAnd_BitOr", "Mod_Mul", "LShift_RShift")),
    *("ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub", "AddNot"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
    *("NumberReplacer", "ExceptionReplacer", "RemoveDecorator"),
)

Span = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Mutant:
    """A module with one change.

    Attributes:
        line: Number of the line that is changed.
        source: The whole module.
        before: The line as it was.
        after: The line as it is.
    """

    line: int
    source: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.line}: {self.before.strip()}\n        ->  {self.after.strip() or '(nothing)'}"


def mutants(source: str) -> list[Mutant]:
    """Return all mutants of a module, in the order of its lines."""
    untouched = list(_untouched(ast.parse(source)))
    changed = {}
    for span, new in [*_replaced(source), *_omitted(source)]:
        if not any(start <= span[0] and span[1] <= end for start, end in untouched) and new != source:
            changed.setdefault(new, span[0][0])
    before = source.splitlines()
    found = []
    for new, line in changed.items():
        first = next(n for n, (old, now) in enumerate(zip(before, new.splitlines(), strict=False)) if old != now)
        found.append(Mutant(line, new, before[first], new.splitlines()[first]))
    return sorted(found, key=lambda mutant: mutant.line)


def _replaced(source: str) -> Iterator[tuple[Span, str]]:
    nodes = list(ast_nodes(parso.parse(source)))
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        spans = [span for node in nodes for span in operator.mutation_positions(node)]
        for occurrence, span in enumerate(spans):
            yield span, mutate_code(source, operator, occurrence)


def _omitted(source: str) -> Iterator[tuple[Span, str]]:
    """Omit statements with an effect: calls, assignments to attributes, ``raise``, ``del``; return None."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Yield)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        is_assignment = isinstance(node, ast.Assign | ast.AugAssign) and not isinstance(targets[0], ast.Name)
        is_return = isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None"
        if is_call or is_assignment or is_return or isinstance(node, ast.Raise | ast.Delete | ast.AugAssign):
            first, last = node.lineno - 1, node.end_lineno - 1
            new = "return None" if is_return else "pass"
            text = lines[first][: node.col_offset] + new + lines[last][node.end_col_offset :]
            span = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
            yield span, "".join([*lines[:first], text, *lines[last + 1 :]])


def _untouched(tree: ast.AST) -> Iterator[Span]:
    for node in ast.walk(tree):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            yield (decorator.lineno, 0), (decorator.end_lineno + 1, 0)
        if isinstance(node, ast.Raise):
            parts.append(node.exc)
        is_big = isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value > 999
        is_format = isinstance(node, ast.keyword) and node.arg in ("indent", "strict")
        is_logged = isinstance(node, ast.Expr) and "_LOGGER." in ast.unparse(node)
        if isinstance(node, ast.Assert) or is_big or is_format or is_logged:
            parts.append(node)
        for part in parts:
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def tests_of(module: str, root: Path = ROOT) -> list[str]:
    """Return the files with the tests of a module, the ones that are named after it first."""
    folder, name = Path("tests", module).parent, Path(module).name
    named = [path for stem in (name, f"{name}_*") for path in root.glob(f"{folder}/test_{stem}.py")]
    found = [str(path.relative_to(root)) for path in named]
    return list(dict.fromkeys([*found, *TESTS.get(module, ())]))


def run_tests(folder: Path, tests: Sequence[str], timeout_s: float, log: Path) -> bool | None:
    """Run tests in a fork of this process; return whether all pass, None if they take too long."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = _run_here(folder, tests, log)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline, done = time.monotonic() + timeout_s, 0
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.02)
        return None
    finally:  # after Ctrl-C, too
        if not done:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _run_here(folder: Path, tests: Sequence[str], log: Path) -> int:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    sys.path[0] = str(folder)
    os.environ.update({"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder.parent)})
    options = (
        "-x",
        "-q",
        "-W",
        "ignore:Module already imported",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not soak",
        "--timeout",
        "120",
    )
    return import_module("pytest").main([*options, *tests])


def check(module: str, sample: int | None, seed: int, keyword: str | None) -> int:
    """Test the mutants of a module and print the survivors; return their number."""
    path = Path("ksuit_runner", f"{module}.py")
    found = mutants((ROOT / path).read_text())
    chosen = found if sample is None else random.Random(seed).sample(found, min(sample, len(found)))
    tests = [*tests_of(module), *(["-k", keyword] if keyword else [])]
    for name in PRELOADED:
        import_module(name)
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as parent:
        folder, log = Path(parent, "project"), Path(parent, "log")
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            options = {"ignore": shutil.ignore_patterns("__pycache__")} if (ROOT / name).is_dir() else {}
            folder.mkdir(exist_ok=True)
            copy(ROOT / name, folder / name, **options)
        started = time.monotonic()
        if not run_tests(folder, tests, 600, log):
            sys.exit(f"{log.read_text()}\nthe tests fail without a mutant: {' '.join(tests)}")
        took_s = time.monotonic() - started
        print(
            f"{len(chosen)} of {len(found)} mutants of {path}, {took_s:.1f} s of tests: {' '.join(tests)}", flush=True
        )
        survived = []
        for mutant in sorted(chosen, key=lambda mutant: mutant.line):
            (folder / path).write_text(mutant.source)
            if run_tests(folder, tests, 10 + 3 * took_s, log):
                survived.append(mutant)
                print(f"  {path}:{mutant}", flush=True)
    killed = len(chosen) - len(survived)
    print(f"{module}: {killed} of {len(chosen)} mutants killed ({100 * killed / len(chosen):.0f} %)")
    return len(survived)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help="path below ksuit_runner, such as record/journal or data/batch_plan")
    parser.add_argument("--sample", type=int, help="number of random mutants to test; by default all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("-k", dest="keyword", help="run only tests whose names contain this")
    given = parser.parse_args()
    module = given.module.removeprefix("ksuit_runner/").removesuffix(".py").replace(".", "/")
    check(module, given.sample, given.seed, given.keyword)


if __name__ == "__main__":
    main()

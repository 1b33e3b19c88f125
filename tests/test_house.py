"""The rules of the house that no linter knows: order of imports, comments in YAML, nothing left lying about."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ksuit_runner"

# A room is a folder of the package, or a module of its root. From the bottom to the top: a room imports only what
# stands in the rows above its own.
ORDER = (
    ("errors", "keyed_random"),
    ("counter", "metric_property", "schedule", "system", "tensors"),
    ("__init__", "paths", "data", "models"),
    ("config",),
    ("launchers", "checkpoint", "config.check"),
    ("trainer", "security"),
    ("ui",),
    ("record",),
    ("tracker", "log_writer"),
    ("delivery", "callback_base"),
    ("resume", "periodic_callback", "metric_callback"),
    ("engine",),
    ("sweep", "testing"),
    ("cli",),
    ("api",),
    ("__main__",),
)
# Explains a mistake at once, without the seconds that these imports take.
HEAVY = ("torch", "mlflow", "sklearn")
LIGHT = (
    *("errors", "counter", "metric_property", "paths", "system"),
    *("config", "config.check", "launchers", "security", "ui", "record"),
)
STARTS = ("api", "cli.dispatch", "cli.start", "__main__")
# What a project's own code imports, what its YAML names, and the start of the command line; nothing else is there.
ROOT_MODULES = {
    *("__init__", "__main__", "api", "testing", "errors", "counter", "paths", "keyed_random", "schedule"),
    *("metric_property", "log_writer", "callback_base", "periodic_callback", "metric_callback"),
}

UNCOMMENTED_KEYS = {"defaults", "_target_", "_partial_"}


def name_of(path: Path) -> str:
    """Return a module's name below ksuit_runner; `__init__` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))


def room_of(module: str) -> str:
    """Return the folder of a module, or the module itself if it lies at the root."""
    is_folder = MODULES[module].name == "__init__.py" and module != "__init__"
    return module if is_folder or "." not in module else module.rpartition(".")[0]


def row_of(room: str) -> int | None:
    return next((row for row, rooms in enumerate(ORDER) if room in rooms), None)


def is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name | ast.Attribute) and ast.unparse(test).split(".")[-1] == "TYPE_CHECKING"


def nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, functions included, without what only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield from nodes_at_run_time(statement)
        else:
            yield from nodes_at_run_time(child)


def imported_names(source: str, package: str) -> set[str]:
    """Return the full names that a module imports; for `from a import b` both `a` and `a.b`, as b may be a module."""
    found: set[str] = set()
    for node in nodes_at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imported_names(path.read_text(), package)


def arrows() -> dict[str, set[str]]:
    """Return which modules of ksuit_runner each of them imports."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = {"__init__" if name == "ksuit_runner" else name for name in imports_of(path)}
        below = {name.removeprefix("ksuit_runner.") for name in names}
        graph[module] = (below & MODULES.keys()) - {module}
    return graph


def test_every_room_has_its_place_in_the_order_of_imports():
    listed = [room for row in ORDER for room in row]
    assert sorted(listed) == sorted({room_of(module) for module in MODULES}), f"ORDER in {Path(__file__).name}"


def test_imports_run_one_way_only():
    wrong = []
    for module, others in arrows().items():
        for other in sorted(others):
            here, there = room_of(module), room_of(other)
            rows = row_of(here), row_of(there)
            # One without a place is what the test above is for.
            if here != there and rows[0] is not None and rows[1] is not None and rows[0] <= rows[1]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_the_root_holds_only_what_users_import():
    at_root = {module for module, path in MODULES.items() if path.parent == PACKAGE}
    assert at_root <= ROOT_MODULES


def test_every_folder_says_what_it_is_for():
    folders = [path for path in MODULES.values() if path.name == "__init__.py"]
    silent = [str(path) for path in folders if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_modules_import_each_other_in_a_circle():
    try:
        list(TopologicalSorter(arrows()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_framework_imports_no_callback():
    roots = {module: {name.split(".")[0] for name in imports_of(path)} for module, path in MODULES.items()}
    wrong = [module for module, names in roots.items() if "callbacks" in names]
    assert not wrong, f"import callbacks: {wrong}"


def test_what_explains_mistakes_imports_quickly():
    light = sorted(module for module in MODULES if room_of(module) in LIGHT or module in STARTS)
    names = ["ksuit_runner" + ("" if name == "__init__" else f".{name}") for name in light]
    script = f"import sys, {', '.join(names)}; print(*sorted(sys.modules.keys() & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def keys_of(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Walk the keys of a document, without what is below `defaults`, whose entries are choices and not values."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            if key.value != "defaults":
                yield from keys_of(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from keys_of(item)


def uncommented_keys(text: str) -> list[str]:
    lines = text.splitlines()
    missing = []
    for key in keys_of(yaml.compose(text)):
        row = key.start_mark.line
        above = lines[row - 1].strip() if row else ""
        # `# @package _global_` in the line above is for Hydra, not for a reader.
        has_comment = re.search(r"\s#\s", lines[row]) or (above.startswith("#") and not above.startswith("# @package"))
        if key.value not in UNCOMMENTED_KEYS and not has_comment:
            missing.append(f"line {row + 1}: {key.value}")
    return missing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_key_in_a_config_has_a_comment(path):
    missing = uncommented_keys(path.read_text())
    assert not missing, "no comment at its end or above it:\n" + "\n".join(missing)


def files_of_the_project() -> list[Path]:
    """Return what git has or would add; without git, everything outside of hidden and generated folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        folders = [ROOT / name for name in ("ksuit_runner", "callbacks", "conf", "tests")]
        listed = [str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*")]
    paths = (ROOT / name for name in listed)
    return sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts)


FOLDERS = "|".join(("home", "root", "Users", "tmp", "work", "mnt", "scratch"))
MACHINE_PATH = re.compile(rf"(?<![\w.:/~}}-])/(?:{FOLDERS})/\w")
# In pieces, or this file would find itself.
LEFT_OVER = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")


@pytest.mark.parametrize(("what", "pattern"), [("a path of one machine", MACHINE_PATH), ("unfinished work", LEFT_OVER)])
def test_nothing_is_left_lying_about(what, pattern):
    found = []
    for path in files_of_the_project():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        place = path.relative_to(ROOT)
        found += [f"{place}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    assert not found, f"{what}:\n" + "\n".join(found)


def test_the_rules_see_what_they_are_made_for():
    source = """
from typing import TYPE_CHECKING
from ..data import container
from .base import X
if TYPE_CHECKING:
    import hidden
def function():
    import ksuit_runner.engine.runner as r
"""
    found = imported_names(source, "ksuit_runner.models")
    assert {"ksuit_runner.data.container", "ksuit_runner.models.base", "ksuit_runner.engine.runner"} <= found
    assert "hidden" not in found
    config = "# @package _global_\na: 1\n# why\nb:\n  c: 2  # so\n  d: 3\ndefaults:\n  - x: y\n_target_: z\n"
    assert uncommented_keys(config) == ["line 2: a", "line 6: d"]
    assert MACHINE_PATH.search("data: /" + "home/anna/digits")
    assert not MACHINE_PATH.search("https://example.org/" + "home/anna")
    assert LEFT_OVER.search("# TO" + "DO: later")

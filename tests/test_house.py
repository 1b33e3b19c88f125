"""Rules of the project that no linter knows: order of imports, comments in YAML, no leftovers."""

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

# The layers of the package, the lowest one first. A unit, which is a folder or a module at the root, imports only units
# of lower layers.
LAYERS = (
    ("errors", "keyed_random"),
    ("config.types",),
    ("counter", "schedule", "system", "tensors"),
    ("distributed", "metric_property"),
    ("__init__", "paths", "data", "models"),
    ("config",),
    ("launchers", "checkpoint", "config.check"),
    ("trainer", "security"),
    ("ui",),
    ("record",),
    ("tracker", "log_writer"),
    ("delivery", "callback_base"),
    ("recorder",),
    ("resume", "callback_bases"),
    ("engine", "metric_callback", "periodic_callback"),
    ("start",),
    ("sweep", "testing"),
    ("reports",),
    ("results",),
    ("cli",),
    ("api",),
    ("__main__",),
)
# What explains mistakes imports none of these: they take seconds.
HEAVY = ("torch", "mlflow", "sklearn")
LIGHT = (
    *("errors", "counter", "metric_property", "paths", "system"),
    *("config", "config.check", "launchers", "security", "ui", "record", "start"),
)
STARTS = ("api", "cli.dispatch", "cli.start", "__main__")
# The root holds only what users import or name in YAML, and the entry point of the command line.
ROOT_MODULES = {
    *("__init__", "__main__", "api", "results", "testing", "errors", "counter", "paths", "keyed_random", "schedule"),
    *("metric_property", "log_writer", "callback_base", "periodic_callback", "metric_callback"),
}

UNCOMMENTED_KEYS = {"defaults", "_target_", "_partial_"}


def name_of(path: Path) -> str:
    """Return a module's name below ksuit_runner; `__init__` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))


def unit_of(module: str) -> str:
    """Return the folder of a module, or the module itself if it lies at the root or has a layer of its own."""
    if layer_of(module) is not None:
        return module
    is_folder = MODULES[module].name == "__init__.py" and module != "__init__"
    return module if is_folder or "." not in module else module.rpartition(".")[0]


def layer_of(unit: str) -> int | None:
    return next((layer for layer, units in enumerate(LAYERS) if unit in units), None)


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


def imports() -> dict[str, set[str]]:
    """Return which modules of ksuit_runner each of them imports."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = {"__init__" if name == "ksuit_runner" else name for name in imports_of(path)}
        below = {name.removeprefix("ksuit_runner.") for name in names}
        graph[module] = (below & MODULES.keys()) - {module}
    return graph


def test_every_unit_is_in_one_layer():
    listed = [unit for layer in LAYERS for unit in layer]
    assert sorted(listed) == sorted({unit_of(module) for module in MODULES}), f"LAYERS in {Path(__file__).name}"


def test_imports_run_one_way_only():
    wrong = []
    for module, others in imports().items():
        for other in sorted(others):
            here, there = unit_of(module), unit_of(other)
            layers = layer_of(here), layer_of(there)
            # A unit without a layer fails the test above.
            if here != there and layers[0] is not None and layers[1] is not None and layers[0] <= layers[1]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_the_root_holds_only_what_users_import():
    at_root = {module for module, path in MODULES.items() if path.parent == PACKAGE}
    assert at_root <= ROOT_MODULES


def test_every_folder_has_a_line_of_purpose():
    folders = [path for path in MODULES.values() if path.name == "__init__.py"]
    silent = [str(path) for path in folders if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_the_documentation_names_what_exists():
    folders = {unit.split(".")[0] for unit in map(unit_of, MODULES) if (PACKAGE / unit.replace(".", "/")).is_dir()}
    assert set(re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs/architecture.md").read_text(), re.M)) == folders
    named = r"`((?:ksuit_runner|callbacks|conf|docs|tests)/[a-z_0-9/.]*)`"  # those with NAME stand for any
    paths = {path for page in DOCUMENTS for path in re.findall(named, page.read_text())}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_modules_import_each_other_without_cycles():
    try:
        list(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_framework_imports_no_callback():
    roots = {module: {name.split(".")[0] for name in imports_of(path)} for module, path in MODULES.items()}
    wrong = [module for module, names in roots.items() if "callbacks" in names]
    assert not wrong, f"import callbacks: {wrong}"


def test_what_explains_mistakes_imports_quickly():
    light = sorted(module for module in MODULES if unit_of(module) in LIGHT or module in STARTS)
    names = ["ksuit_runner" + ("" if name == "__init__" else f".{name}") for name in light]
    script = f"import sys, {', '.join(names)}; print(*sorted(sys.modules.keys() & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def keys_of(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Walk the keys of a document, without those below `defaults` (choices) and `_args_` (a layer explains itself)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            if key.value not in ("defaults", "_args_"):
                yield from keys_of(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from keys_of(item)


def uncommented_keys(text: str) -> list[str]:
    lines = text.splitlines()
    # What `_global_` files set at the top is a group, or explained in config.yaml.
    is_global = text.startswith("# @package _global_")
    missing = []
    for key in keys_of(yaml.compose(text)):
        line, column = key.start_mark.line, key.start_mark.column
        is_known = key.value in UNCOMMENTED_KEYS or (is_global and column == 0)
        has_comment = re.search(r"\s#\s", lines[line]) or (line > 0 and lines[line - 1].lstrip().startswith("#"))
        if not is_known and not has_comment:
            missing.append(f"line {line + 1}: {key.value}")
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
def test_there_are_no_leftovers(what, pattern):
    found = []
    for path in files_of_the_project():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        name = path.relative_to(ROOT)
        found += [f"{name}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    assert not found, f"{what}:\n" + "\n".join(found)


# An override as a shell sees it: zsh refuses one with a bracket, a brace, a star or a tilde, unless it is quoted.
OVERRIDE = re.compile(r"(?:[+~]{0,2}[a-z][\w.]*=\S+|~[a-z][\w.]*)")
UNQUOTED = re.compile(r"[\[\]{}*?]|^~")


def unquoted_overrides(text: str) -> list[str]:
    """Return the overrides in commands and in inline code that are only understood by some shells."""
    commands = re.findall(r"(?:python -m ksuit_runner|ksuit-runner)((?: +(?:'[^']*'|[^\s#`]+))+)", text)
    unfenced = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    inline = re.findall(r"(?<!`)`((?:[\w=./+~-]+ )*[+~]{0,2}[a-z][\w.]*=[^`\n' ]+)`(?!`)", unfenced)
    words = [word for command in [*commands, *inline] for word in re.findall(r"'[^']*'|\S+", command)]
    return [word for word in words if OVERRIDE.fullmatch(word) and UNQUOTED.search(word)]


EXAMPLE_FILES = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".md", ".yaml"))


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGS, *EXAMPLE_FILES], ids=str)
def test_commands_can_be_pasted_into_any_shell(path):
    text = path.read_text()
    assert unquoted_overrides(text) == []
    # The program has one name in all of them; the tutorial says that this is the same.
    named = text.count("python -m ksuit_runner")
    assert named == (path.name == "tutorial.md")


def test_the_rules_find_violations():
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
    config = "a: 1\n# why\nb:\n  c: 2  # so\n  d: 3\n  _args_: [{e: 4}]  # so\ndefaults:\n  - x: y\n_target_: z\n"
    assert uncommented_keys(config) == ["line 1: a", "line 5: d"]
    assert uncommented_keys(f"# @package _global_\n{config}") == ["line 6: d"]
    assert MACHINE_PATH.search("data: /" + "home/anna/digits")
    assert not MACHINE_PATH.search("https://example.org/" + "home/anna")
    assert LEFT_OVER.search("# TO" + "DO: later")
    examples = (
        "`callbacks=[a]` `'callbacks=[a]'` `seed=0,1` `list=3 trust=[x]`\n```\npython -m ksuit_runner ~x 'y=[1]'\n```\n"
    )
    assert unquoted_overrides(examples) == ["~x", "callbacks=[a]", "trust=[x]"]

"""What MkDocs adds to these pages: the reference, made of the comments in conf/ and the docstrings of the code."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
MODULES = ("data.order", "data.wrappers", "data.collators", "schedule")
"""Modules all of whose functions and classes a config may name."""
IN_PYTHON = ("ksuit_runner.trainer.SgdTrainer", "ksuit_runner.data.container.DataContainer")
"""What another page has."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference."""
    pages = {"config": config_page(), "python": python_page(), "callbacks": callbacks_page(), "parts": parts_page()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Write links to files of the repository, which are not part of the site, as what they are called."""
    return markdown if page.file.src_uri.startswith("reference/") else OUTSIDE.sub(r"\1", markdown)


def config_page() -> str:
    """Return a section for each group of conf/, with the files of its choices, whose comments explain every key."""
    conf = ROOT / "conf"
    parts = [
        "# All of the config",
        "Each group is a folder of `conf/`, each choice a file in it.",
        "## conf/config.yaml",
    ]
    parts.append(_as_yaml(conf / "config.yaml"))
    for group in sorted(path for path in conf.iterdir() if path.is_dir()):
        parts.append(f"## {group.name}")
        for file in sorted(group.glob("*.yaml")):
            parts += [f"### {group.name}={file.stem}", _as_yaml(file)]
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    """Return what can be imported from the package itself, and from `ksuit_runner.testing`."""
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "ksuit_runner/__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES"
    )
    objects = [f"ksuit_runner.{module}.{name}" for name, module in sorted(names.items())]
    intro = "All of these are imported from `ksuit_runner`, the last ones from `ksuit_runner.testing`."
    testing = [f"ksuit_runner.testing.{name}" for name in ("tiny_run", "TinyRun")]
    return _page("What your code imports", intro, [*objects, *testing])


def callbacks_page() -> str:
    """Return the classes of the callbacks that ship, with all of their arguments."""
    intro = "Their arguments are the keys of their files in `conf/callbacks/`. [What each does](../callbacks.md)."
    modules = sorted(path.stem for path in (ROOT / "callbacks").glob("*.py"))
    return _page("Arguments of the callbacks", intro, _public(f"callbacks.{name}" for name in modules))


def parts_page() -> str:
    """Return everything else that files of conf/ name, and what may be named in addition."""
    named = re.compile(r"^\s*_target_: (ksuit_runner\.[\w.]+)$", re.MULTILINE)
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    targets = {target for file in files for target in named.findall(file.read_text())}
    modules = [f"ksuit_runner.{name}" for name in MODULES]
    others = sorted(target for target in targets if target not in IN_PYTHON and not target.startswith(tuple(modules)))
    intro = "What the files of `conf/` name besides callbacks, and what can be written there instead."
    return _page("Datasets, models, schedules and other parts", intro, [*_public(modules), *others])


def _page(title: str, intro: str, objects: list[str]) -> str:
    return f"# {title}\n\n{intro}\n\n" + "".join(f"::: {name}\n\n" for name in objects)


def _public(modules: Iterable[str]) -> list[str]:
    """Return the public classes and functions of modules."""
    trees = {name: ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text()) for name in modules}
    defined = ((name, node) for name, tree in trees.items() for node in tree.body)
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [f"{name}.{node.name}" for name, node in defined if isinstance(node, kinds) and node.name[0] != "_"]


def _as_yaml(file: Path) -> str:
    return f"```yaml\n{file.read_text().rstrip()}\n```"

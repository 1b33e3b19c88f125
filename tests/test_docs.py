"""The documentation: its site, and what its pages say about the code."""

import inspect
import re

import pytest
from command import REPOSITORY

from ksuit_runner import CallbackBase, PeriodicCallback
from ksuit_runner.callback_base import is_template

HOOKS = (REPOSITORY / "docs" / "hooks.md").read_text()


def test_the_site_is_built_without_a_dead_link(tmp_path):
    pytest.importorskip("mkdocstrings")
    commands, load_config = (pytest.importorskip(f"mkdocs.{name}") for name in ("commands.build", "config"))
    config = load_config.load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    commands.build(config)
    page = (tmp_path / "reference" / "config.html").read_text()
    choices = {f"{path.parent.name}={path.stem}" for path in (REPOSITORY / "conf").glob("*/*.yaml")}
    assert choices <= set(re.findall(r'<h3 id="[^"]+">([^<]+)<', page))
    loaded = re.compile(r'<(?:script|link|img|iframe)\b[^>]*="(?:https?:)?//|class="mermaid')
    assert not [path for path in tmp_path.rglob("*.html") if loaded.search(path.read_text())], "it needs no network"
    assert "early_stop.EarlyStop" in (tmp_path / "reference" / "callbacks.html").read_text()


def test_the_table_of_hooks_has_every_hook_and_what_it_gets():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*)\|$", HOOKS, re.MULTILINE)
    hooks = {name: hook for name, hook in inspect.getmembers(PeriodicCallback, callable) if is_template(hook)}
    assert sorted(name for name, _ in rows) == sorted(hooks)
    assert {name for name, hook in inspect.getmembers(CallbackBase, callable) if is_template(hook)} < set(hooks)
    for name, also in rows:
        arguments = set(inspect.signature(hooks[name]).parameters) - {"self", "update_counter"}
        assert set(re.findall(r"`(\w+)`", also)) - {"total", "training_step"} == arguments, name

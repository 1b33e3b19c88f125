"""The example of a callback and its test in the documentation."""

import re
import sys
from types import ModuleType

from command import REPOSITORY

PAGE = (REPOSITORY / "docs" / "callback.md").read_text()


def block_of(first_line):
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if text.startswith(first_line))
    return found


def test_the_example_of_a_callback(tmp_path, monkeypatch):
    module = ModuleType("callbacks.weight_norm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block_of("# callbacks/weight_norm.py"), vars(module))
    example = {}
    exec(block_of("# tests/test_weight_norm.py"), example)
    example["test_weight_norm"](tmp_path)

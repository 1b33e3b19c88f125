"""A package is imported without what it can do without, where that is allowed."""

import sys

import pytest

from ksuit_runner.system import lean_import

PACKAGE = """
try:
    import optional_part
except ImportError:
    optional_part = None
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    (tmp_path / "does_without.py").write_text(PACKAGE)
    (tmp_path / "needs_it.py").write_text("import half_way\nimport optional_part")
    (tmp_path / "half_way.py").write_text("")
    (tmp_path / "optional_part.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lean_import, "_is_allowed", True)
    yield
    for name in ("does_without", "needs_it", "half_way", "optional_part"):
        sys.modules.pop(name, None)


def test_what_is_optional_is_not_imported_and_still_there_for_others(packages):
    assert lean_import.import_without(("optional_part",), "does_without").optional_part is None
    import optional_part

    assert lean_import.import_without(("optional_part",), "does_without").optional_part is None
    assert optional_part.__name__ in sys.modules


def test_a_package_that_needs_it_gets_it(packages):
    assert lean_import.import_without(("optional_part",), "needs_it").optional_part is not None


def test_a_process_that_runs_code_of_the_user_imports_everything(packages):
    lean_import.allow(False)
    assert lean_import.import_without(("optional_part",), "does_without").optional_part is not None

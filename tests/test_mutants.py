"""What `make mutants` changes in a module, and which tests it then asks."""

import mutants

SOURCE = """
@dataclass(frozen=True)
class Box:
    size: int | None = None


def f(a: int | float) -> int | None:
    assert a > 1
    g(a)
    _LOGGER.info("many: %d", 7)
    json.dumps(a, indent=2)
    if a < 3:
        raise ValueError("x" + "y")
    self.a = 1_000_000
    return a + b
"""
CHANGES = {
    "    pass": 4,  # a call, another one, an assignment to an attribute, and the error, each left out
    "    if a <= 3:": 1,
    "    if a > 3:": 1,
    "    if not a < 3:": 1,
    "    if a < 4:": 1,
    "    if a < 2:": 1,
    "    return a - b": 1,
    "    return None": 1,
}


def test_every_change_that_matters_is_made_and_no_other():
    found = [mutant.after for mutant in mutants.mutants(SOURCE)]
    expected = [line.strip() for line, count in CHANGES.items() for _ in range(count)]
    assert sorted(" ".join(line.split()) for line in found) == sorted(expected)


def test_the_tests_that_are_named_exist():
    assert mutants.tests_of("record/journal")[0] == "tests/record/test_journal.py"
    assert set(mutants.tests_of("data/batch_plan")) == {"tests/data/test_batch_plan.py"}
    for module, files in mutants.TESTS.items():
        assert (mutants.ROOT / "ksuit_runner" / f"{module}.py").is_file(), module
        for file in files:
            path, _, name = file.partition("::")
            assert name.partition("[")[0] in (mutants.ROOT / path).read_text(), file
